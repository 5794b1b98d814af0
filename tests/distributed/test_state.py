"""A training that is interrupted goes on as if it had not been: on the same ranks by bits, on others within 1e-6."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery.config import DDP, FSDP1, FSDP2
from surgery.state.folder import STAGED, states
from tests.helpers.apart import mount_alone, mount_tmpfs, remount, run_apart
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks, try_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WAYS: dict[str, Any] = {
    "FSDP1": FSDP1(),
    "FSDP1, use_orig_params": FSDP1(use_orig_params=True),
    "FSDP2": FSDP2(),
    "DDP": DDP(),
    "one process": None,
}
SHARDED = [way for way in WAYS if way != "one process"]
HALF, STEPS = 2, 4


class Cursor:
    """A place in endless data, of which each rank has its own part."""

    def __init__(self) -> None:
        self.number = int(os.environ.get("RANK", "0")) * 1000

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


@dataclass(kw_only=True)
class Job:
    """Everything of a training. dropout: with it each rank has data of its own; without it all have the same."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    cursor: Cursor
    dropout: float

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.cursor.number += 1
            seed = self.cursor.number + random.randrange(9) + int(np.random.randint(9)) if self.dropout else 7
            ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        with torch.no_grad():  # leaves the root of FSDP gathered
            self.model(input_ids=ids)

    def save(self, folder: Path, step: int) -> Path:
        import surgery

        return surgery.save_state(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            step=step,
            position=self.cursor,
            extra={"note": np.arange(3), "loss": 0.5},
        )

    def load(self, folder: Path, **options: Any) -> Any:
        import surgery

        return surgery.load_state(
            folder, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, **options
        )

    def end(self) -> dict[str, torch.Tensor]:
        """The whole adapter on rank 0, what the optimizer has here, and the next random numbers."""
        import surgery

        found = {**surgery.adapter_state(self.model)}
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                local = value.to_local() if hasattr(value, "to_local") else value
                found[f"{number} {key}"] = torch.as_tensor(local).clone()
        rate = self.optimizer.param_groups[0]["lr"]
        draws = [rate, random.random(), float(np.random.rand()), float(torch.rand(1)), float(self.cursor.number)]
        return {**found, "rate, draws, cursor": torch.tensor(draws, dtype=torch.float64)}


def job(base: Path, shard: Any, *, dropout: float = 0.0, seed: int = 0, rank: int = 4, alpha: int = 8) -> Job:
    from peft import LoraConfig

    import surgery

    own = seed * 100 + int(os.environ.get("RANK", "0"))
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = surgery.qlora(base, lora=lora, shard=shard, dtype=torch.float32, report=surgery.Report())
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:3], "weight_decay": 0.1}, {"params": trained[3:]}], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return Job(model=model, optimizer=optimizer, scheduler=scheduler, cursor=Cursor(), dropout=dropout)


def on_the_same_ranks(base: Path, root: Path) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """What differs, by way, between a straight run and one that was interrupted; the adapter of a straight run without
    dropout, of which the state was saved half way.
    """
    differing = {}
    for way in SHARDED:
        shard = WAYS[way]
        straight = job(base, shard, dropout=0.2)
        straight.train(HALF)
        straight.save(root / way, HALF)
        straight.train(STEPS - HALF)
        expected = straight.end()
        again = job(base, shard, dropout=0.2, seed=1)
        again.train(1)  # so that there is a state to be replaced
        state = again.load(root / way, position=again.cursor)
        assert (state.step, state.world_size, state.extra["loss"], state.extra["note"].tolist()) == (
            2,
            2,
            0.5,
            [0, 1, 2],
        )
        again.train(STEPS - HALF)
        found = again.end()
        assert found.keys() == expected.keys()
        differing[way] = [name for name in expected if not torch.equal(found[name], expected[name])]
    straight = job(base, FSDP1())
    straight.train(HALF)
    straight.save(root / "plain", HALF)
    straight.train(STEPS - HALF)
    return differing, straight.end()


def on_others(base: Path, root: Path, pairs: list[tuple[str, str]]) -> dict[str, dict[str, torch.Tensor]]:
    """How the run without dropout ends here, by way; what the first way was given, the second one loads from it."""
    found = {}
    for way, then in pairs:
        first, folder = job(base, WAYS[way], seed=2), root / f"{way} on {os.environ.get('WORLD_SIZE', '1')}"
        state = first.load(root / "plain")
        assert state.position is None
        assert [each["number"] for each in state.positions] == [HALF, 1000 + HALF]
        first.save(folder, HALF)
        second = job(base, WAYS[then], seed=3)
        second.load(folder)
        second.train(STEPS - HALF)
        found[f"{way}, {then}"] = second.end()
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Straight:
    root: Path
    differing: list[dict[str, list[str]]]
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    root = tmp_path_factory.mktemp("states")
    (here, end), (there, _) = run_ranks(on_the_same_ranks, 2, base, root)
    return Straight(root=root, differing=[here, there], end=end)


def test_a_run_goes_on_by_bits_on_as_many_ranks(straight: Straight) -> None:
    assert straight.differing == [{way: [] for way in SHARDED}] * 2


def require_near(straight: Straight, found: dict[str, dict[str, torch.Tensor]]) -> None:
    for way, end in found.items():
        names = [name for name in straight.end if "lora_" in name or "modules_to_save" in name]
        assert len(names) == 2 * 4 + 1
        assert set(names) < end.keys()
        worst = max(float((end[name] - straight.end[name]).abs().max()) for name in names)
        assert worst < 1e-6, way


def test_a_run_goes_on_with_more_ranks_and_another_sharding(base: Path, straight: Straight) -> None:
    pairs = [("FSDP2", "FSDP1, use_orig_params"), ("DDP", "FSDP1")]
    require_near(straight, run_ranks(on_others, 3, base, straight.root, pairs)[0])


def test_a_run_goes_on_in_one_process(base: Path, straight: Straight) -> None:
    require_near(straight, on_others(base, straight.root, [("one process", "one process")]))


def test_torch_reads_the_file_by_itself(straight: Straight, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    newest = states(straight.root / "plain")[0]
    dcp_to_torch_save(newest, tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert found["model"][name].shape == (96, 64)
    assert found["optimizer"]["state"][name]["exp_avg"].shape == (96, 64)
    manifest = json.loads((newest / "manifest.json").read_text())
    assert not [name for name in manifest["parameters"] if "lora_" not in name and "modules_to_save" not in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, r"of other trainable parameters: .*lora_A.*: expected \[4, \d+, 'float32'\], found \[2,"),
        ({"alpha": 16}, "adapters: expected .*'lora_alpha': '8'.*, found .*'lora_alpha': '16'"),
    ],
)
def test_other_adapters_are_refused(base: Path, straight: Straight, options: dict[str, int], message: str) -> None:
    from surgery import ConfigError

    mine = job(base, None, **options)
    before = mine.end()
    random_state = random.getstate()
    with pytest.raises(ConfigError, match=message):
        mine.load(straight.root / "plain")
    assert random.getstate() == random_state
    assert all(torch.equal(before[name], tensor) for name, tensor in mine.end().items() if "lora_" in name)


def test_another_base_optimizer_or_scheduler_is_refused(straight: Straight, tmp_path: Path) -> None:
    from surgery import ConfigError

    mine = job(save_tiny(tmp_path / "other", dtype=torch.float32), None)
    folder = straight.root / "plain"
    with pytest.raises(
        ConfigError, match=r"is of adapters on .*base.*, found a model that is .*other.*other_base=True"
    ):
        mine.load(folder)
    scheduler, mine.scheduler = mine.scheduler, None
    with pytest.raises(ConfigError, match=r"scheduler: expected torch.*CosineAnnealingLR, of which .*, found None"):
        mine.load(folder, other_base=True)
    mine.scheduler, optimizer = scheduler, mine.optimizer
    mine.optimizer = torch.optim.SGD(optimizer.param_groups, lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizer: expected torch.*AdamW, of which .*, found torch.*SGD"):
        mine.load(folder, other_base=True)
    mine.optimizer = torch.optim.AdamW([p for p in mine.model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match="expected an optimizer with 2 groups of parameters, found 1"):
        mine.load(folder, other_base=True)
    mine.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match="expected an optimizer of parameters of the model, found 1 of other tensors"):
        mine.load(folder, other_base=True)
    mine.optimizer = optimizer
    with pytest.raises(ConfigError, match=r"position: .* differs over the 2 ranks that have saved it"):
        mine.load(folder, other_base=True, position=mine.cursor)
    assert mine.load(folder, other_base=True).step == HALF
    assert mine.load(tmp_path / "nothing") is None


# Files: a small model of its own, whose parameters are the number of steps. -------------------------------------------


def counted(step: float) -> dict[str, Any]:
    model = nn.Linear(160, 160)
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 160)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
    return {"model": model, "optimizer": optimizer}


def save_until_killed(folder: Path, seconds: float) -> None:
    """Go on from the newest state, with one after the other; rank 0 is killed so long after the first one."""
    import surgery

    parts = counted(-1)
    state = surgery.load_state(folder, **parts)
    assert parts["model"].weight.unique().tolist() == [state.step if state else -1]
    killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    for step in itertools.count(state.step + 1 if state else 1):
        for parameter in parts["model"].parameters():
            nn.init.constant_(parameter, step)
        surgery.save_state(folder, step=step, **parts)
        if os.environ["RANK"] == "0" and not killer.is_alive():
            killer.start()


def test_a_kill_leaves_the_state_before(tmp_path: Path) -> None:
    import surgery

    newest = 0
    for number in range(6):
        # Each job finds a state that is whole, or ends with an error instead of being killed.
        outcomes = try_ranks(save_until_killed, 1 + number % 2, tmp_path, 0.1 * random.random())
        assert outcomes[0].failure == "the process ended without a result"
        assert 1 <= len(states(tmp_path)) <= 3
        before, newest = newest, int(states(tmp_path)[0].name.rpartition("-")[2])
        assert newest > before
    parts = counted(-1)
    state = surgery.load_state(tmp_path, **parts)
    assert state is not None
    assert parts["model"].bias.unique().tolist() == [state.step] == [newest]


def fill_the_disk(folder: Path) -> str:
    """What this rank is told if rank 1 has no room; a process that is limited to short files stands for a full disk."""
    import surgery

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, resource.RLIM_INFINITY))
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.save_state(folder, step=9, position={"more": torch.zeros(1000)}, **counted(9))
    return f"{caught.type.__name__}: {caught.value}"


def take_the_folder(folder: Path) -> str:
    import surgery

    with pytest.raises(surgery.ConfigError) as caught:
        surgery.load_state(folder, **counted(0))
    return str(caught.value)


def test_what_cannot_be_written_leaves_the_state_before(tmp_path: Path) -> None:
    import surgery

    with pytest.raises(surgery.ConfigError, match="step: expected a whole number from 0 on, found -1"):
        surgery.save_state(tmp_path, step=-1, **counted(0))
    with pytest.raises(surgery.ConfigError, match=r"expected position, extra .* to be plain values"):
        surgery.save_state(tmp_path, step=1, position=threading.Thread, **counted(0))
    (tmp_path / "file").touch()
    with pytest.raises(surgery.ConfigError, match="file cannot be written: it is a file"):
        surgery.save_state(tmp_path / "file", step=1, **counted(0))
    parts, folder = counted(1), tmp_path / "states"
    run_ranks(save_once, 1, folder)
    told = run_ranks(fill_the_disk, 2, folder)
    assert "File too large" in told[1]
    assert "File too large" in told[0]
    assert [state.name for state in states(folder)] == ["000001-step-1"]
    assert not (folder / STAGED).exists()
    for step in (2, 3, 4):
        surgery.save_state(folder, step=step, **parts)
    assert [state.name for state in states(folder)] == ["000004-step-4", "000003-step-3"]
    [refusal] = run_ranks(take_the_folder, 1, folder)
    assert f"is in use by process {os.getpid()}" in refusal


def on_disks(folder: Path) -> tuple[str, str, list[str]]:
    """Refusals of a disk that is full, and of one that may only be read; the states on the first one afterwards."""
    import surgery

    mount_alone()
    full, read_only = mount_tmpfs(folder / "full", "size=800k"), mount_tmpfs(folder / "read-only")
    surgery.save_state(full, step=1, **counted(1))
    shutil.copytree(states(full)[0], read_only / states(full)[0].name)
    remount(read_only, "ro")
    with pytest.raises(surgery.StateError) as lacking:
        surgery.save_state(full, step=2, position=torch.zeros(200_000), **counted(2))
    with pytest.raises(surgery.ConfigError) as forbidden:
        surgery.save_state(read_only, step=2, **counted(2))
    loaded = surgery.load_state(read_only, **counted(0))
    assert loaded is not None
    assert loaded.step == 1
    return str(lacking.value), str(forbidden.value), [path.name for path in states(full)]


def test_a_full_disk_and_one_that_is_read_only_are_refused(tmp_path: Path) -> None:
    lacking, forbidden, left = run_apart(on_disks, tmp_path)
    assert "No space left on device. Earlier states are as they were" in lacking
    assert "cannot be written: Read-only file system; choose another folder" in forbidden
    assert left == ["000001-step-1"]


def save_once(folder: Path) -> None:
    import surgery

    surgery.save_state(folder, step=1, **counted(1))


def test_the_newest_whole_state_is_loaded(tmp_path: Path) -> None:
    import surgery

    for step in (1, 2, 3):
        surgery.save_state(tmp_path, step=step, keep=3, **counted(step))
    third, second, first = states(tmp_path)
    (third / "manifest.json").write_text('{"format": 1,')
    data = bytearray((second / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (second / "__0_0.distcp").write_bytes(data)
    parts = counted(-1)
    with pytest.warns(UserWarning, match=r"000001-step-1 is loaded, .*manifest.json.*__0_0.distcp: expected checksum"):
        state = surgery.load_state(tmp_path, **parts)
    assert state is not None
    assert (state.step, state.path, parts["model"].weight.mean().item()) == (1, first, 1.0)
    (first / "rank-00000.pt").unlink()
    with pytest.raises(
        surgery.StateError, match=r"none of the 3 states in .* is whole: .*rank-00000.pt: expected .* None"
    ):
        surgery.load_state(tmp_path, **parts)
