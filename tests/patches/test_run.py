from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import patches
from patches.run import environment
from patches.startup import write_pth

ROOT = Path(__file__).parents[2]

PROJECT = {
    "my_project/__init__.py": "",
    "my_project/patches.py": (
        "import patches\n"
        "@patches.register('late.one', target='late_lib:one', reason='a test')\n"
        "def one(wrapped, instance, args, kwargs):\n"
        "    from .helper import tag\n"  # found later, although only this package was on the path
        "    return tag(wrapped(*args, **kwargs))\n"
        "@patches.register('late.other', target='late_lib:one', reason='a test', conflicts=('late.one',))\n"
        "def other(wrapped, instance, args, kwargs): return 'other'\n"
    ),
    "my_project/helper.py": "def tag(value): return f'patched {value}'\n",
    "lib/late_lib.py": "def one(): return 1\n",
    "script.py": "import sys\nfrom late_lib import one\nprint(one(), __name__, sys.argv[1:])\n",
    "facts.py": (
        "import json, sys\n"
        "facts = [sys.argv, __name__, sys.path[0], sorted(set(globals()) - {'json', 'sys'}), __file__]\n"
        "json.dump(facts, sys.stdout)\n"
        "1 / len(sys.argv[2:])\n"
    ),
}
GIVEN = ("--apply", "late.one", "--import", "my_project.patches")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def python(
    project: Path, *arguments: str, cwd: Path | None = None, path: str = str(ROOT), **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((path, str(project / "lib"))), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def run(project: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return python(project, "-m", "patches", "run", *GIVEN, "--", *command, **options)


STARTUP = os.pathsep.join((str(ROOT), str(ROOT / "patches" / "startup")))


def started(project: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process with nothing but the environment."""
    given = {"PATCHES_APPLY": "late.one", "PATCHES_IMPORT": "my_project.patches", "PATCHES_FOLDER": str(project)}
    return python(project, *command, path=STARTUP, **{**given, **variables})


def output(project: Path, *command: str, **options: Any) -> str:
    ran = run(project, *command, **options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_script_is_patched_before_it_copies_the_original(project: Path) -> None:
    assert output(project, "script.py", "-x", "--", "y") == "patched 1 __main__ ['-x', '--', 'y']"
    assert python(project, "script.py").stdout.split()[0] == "1"


@pytest.mark.parametrize("command", [("facts.py",), ("facts.py", "a", "b"), ("-m", "facts"), ("-m", "facts", "a", "b")])
def test_it_runs_as_by_python_itself(command: tuple[str, ...], project: Path) -> None:
    ran, plain = run(project, *command), python(project, *command)
    assert (ran.returncode, ran.stdout, ran.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert ("ZeroDivisionError" in ran.stderr) is (command[-1] != "b")


@pytest.mark.parametrize(
    "target", ["textwrap:shorten", "csv:reader", "email:message_from_string", "packaging.version:parse"]
)
def test_what_the_registry_imports_itself_can_be_patched(target: str, project: Path) -> None:
    (project / "used.py").write_text(
        "import patches\n"
        f"@patches.register('used.one', target='{target}', reason='a test')\n"
        "def one(wrapped, instance, args, kwargs): return wrapped(*args, **kwargs)\n"
    )
    module = target.partition(":")[0]
    script = f"import {module}, patches; print(*(row.state for row in patches.audit()))"
    given = {"PATCHES_APPLY": "used.one", "PATCHES_IMPORT": "used", "PATCHES_FOLDER": str(project)}
    ran = python(project, "-c", script, path=STARTUP, **given)
    assert ran.stdout.split() == ["active"], ran.stderr


@pytest.mark.parametrize("code", ["3", "'a message'", "None"])
def test_exit_codes_are_the_script_s(code: str, project: Path) -> None:
    ran, plain = (each(project, "-c", f"import sys; sys.exit({code})") for each in (run, python))
    assert (ran.returncode, ran.stderr) == (plain.returncode, plain.stderr)


def test_a_signal_reaches_the_script(project: Path) -> None:
    (project / "wait.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(project / "lib")))}
    command = [sys.executable, "-m", "patches", "run", *GIVEN, "wait.py"]
    with subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == -signal.SIGTERM


def test_a_program_is_found_on_the_path(project: Path) -> None:
    program = project / "bin" / "serve"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} script.py "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join((str(program.parent), os.environ["PATH"]))
    assert output(project, "serve", "a", PATH=path) == "patched 1 __main__ ['a']"


def test_a_program_that_is_not_there_is_named(project: Path) -> None:
    ran = run(project, "sevre", "a")
    assert ran.returncode == 2
    assert "found 'sevre': no file here, and no program on the PATH" in ran.stderr


def test_options_that_would_have_python_ignore_its_environment_are_refused(project: Path) -> None:
    ran = run(project, "-I", "script.py")
    assert ran.returncode == 2
    assert "found '-I'" in ran.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--apply", "late.on", "--import", "my_project.patches"), "did you mean late.one"),
        (("--apply", "late.one,late.other", "--import", "my_project.patches"), "may not be active together"),
        (("--apply", "late.one", "--import", "my_project.gone"), "'my_project.gone', which is to register patches"),
        ((), "expected ids of patches to apply"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(given: tuple[str, ...], says: str, project: Path) -> None:
    ran = python(project, "-m", "patches", "run", *given, "--", "script.py")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_a_command_it_prints_the_environment(project: Path) -> None:
    python_here = shlex.quote(sys.executable)
    given = "--apply 'late.o*,late.one' --import my_project.patches"
    (project / "my_project" / "patches.py").write_text(
        PROJECT["my_project/patches.py"].partition("@patches.register('late.other'")[0]
    )
    script = f'eval "$({python_here} -m patches run {given})" && exec {python_here} script.py'
    program = f"import os; os.execl('/bin/sh', 'sh', '-c', {script!r})"
    ran = python(project, "-c", program)
    assert ran.stdout.startswith("patched 1"), ran.stderr


@pytest.mark.parametrize(
    ("apply", "imports", "says"),
    [("late.on", "my_project.patches", "did you mean late.one"), ("late.one", "my_project.gone", "No module named")],
)
def test_a_process_that_cannot_be_patched_does_not_run(apply: str, imports: str, says: str, project: Path) -> None:
    ran = started(project, "-c", "print('ran')", PATCHES_APPLY=apply, PATCHES_IMPORT=imports)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert says in ran.stderr
    assert f"PATCHES_APPLY={apply}" in ran.stderr


def test_an_interpreter_without_the_package_says_so(project: Path) -> None:
    (project / "lib" / "model_surgery_patches.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join((str(ROOT / "patches" / "startup"), str(project / "lib")))
    ran = python(project, "-S", "-c", "import sitecustomize; print('ran')", path=path, PATCHES_APPLY="late.one")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "cannot import patches" in ran.stderr


def test_without_the_variable_nothing_is_imported(project: Path) -> None:
    program = "import sys; print(*{'patches', 'wrapt'} & sys.modules.keys())"
    ran = started(project, "-c", program, PATCHES_APPLY="")
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, [], "")


def test_a_sitecustomize_of_somebody_else_runs_too(project: Path) -> None:
    (project / "lib" / "sitecustomize.py").write_text("import sys\nsys.other = __file__\n")
    program = "import sys, sitecustomize; print(sys.other == sitecustomize.__file__)"
    assert output(project, "-c", program) == "True"
    (project / "lib" / "sitecustomize.py").write_text("raise RuntimeError('theirs')\n")
    ran, plain = started(project, "-c", "print(1)"), python(project, "-c", "print(1)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert "theirs" in ran.stderr


def test_installed_the_variables_are_enough(project: Path) -> None:
    (project / "site").mkdir()
    (project / "site" / write_pth.NAME).write_text(write_pth.LINE)
    program = "import site; site.addsitedir('site'); import late_lib; print(late_lib.one())"
    given = {"PATCHES_IMPORT": "my_project.patches", "PATCHES_APPLY": "late.one"}
    assert python(project, "-c", program, **given).stdout == "patched 1\n"
    assert python(project, "-c", program).stdout == "1\n"
    ran = python(project, "-c", program, PATCHES_APPLY="late.one")
    assert (ran.returncode, ran.stdout) == (2, "")
    both = os.pathsep.join((STARTUP, str(project / "site")))  # as `patches run` does where it is installed
    ran = python(project, "-c", f"{program}; import patches; print(len(patches.active()))", path=both, **given)
    assert ran.stdout.split() == ["patched", "1", "1"]


@pytest.mark.parametrize("program", ["python -m patches", "patches"])
def test_a_project_in_the_current_folder_is_found_by_its_entry_points(program: str, project: Path) -> None:
    (project / "pyproject.toml").write_text(
        "[project.entry-points.'patches.registry']\n"
        "'late.one' = 'my_project.patches'\n'late.other' = 'my_project.patches'\n"
    )
    start = ["-m", "patches"]
    if program == "patches":  # as the console script, which has not the current folder on its path
        start = ["-P", "-c", "import sys; from patches.cli import main; sys.argv[0] = 'patches'; sys.exit(main())"]
    assert "late.other  " in python(project, *start, "list").stdout
    ran = python(project, *start, "run", "--apply", "late.one", "script.py")
    assert ran.stdout.startswith("patched 1"), ran.stderr
    assert "needed" in python(project, *start, "check", "late.one").stdout
    (project / "pyproject.toml").write_text("[project.entry-points.'patches.registry'\n")
    assert "late" not in python(project, *start, "list").stdout


def test_a_test_suite_runs_under_it(project: Path) -> None:
    (project / "test_late.py").write_text(
        "def test_first():\n    import late_lib\n    assert late_lib.one() == 'patched 1'\n"
        "def test_second():\n    import late_lib\n    assert late_lib.one() == 'patched 1'\n"
    )
    assert "2 passed" in output(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_late.py")


def test_runs_nest(project: Path) -> None:
    (project / "my_project" / "more.py").write_text(
        "import patches\n"
        "@patches.register('late.join', target='os.path:basename', reason='a test')\n"
        "def join(wrapped, instance, args, kwargs): return 'base'\n"
    )
    inner = ("-m", "patches", "run", "--apply", "late.join", "--import", "my_project.more", "--")
    program = "import os, late_lib; print(late_lib.one(), os.path.basename('/a/b'))"
    assert output(project, *inner, "-c", program) == "patched 1 base"


CHILDREN = {
    "subprocess": "subprocess.run([sys.executable, '-c', 'import late_lib; print(late_lib.one())'], cwd='/')",
    "spawn": "print(multiprocessing.get_context('spawn').Pool(1).apply(ask))",
    "forkserver": "print(multiprocessing.get_context('forkserver').Pool(1).apply(ask))",
    "fork": "print(multiprocessing.get_context('fork').Pool(1).apply(ask))",
    "executor": "print(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')).submit(ask).result())",
}


@pytest.mark.parametrize("way", CHILDREN)
def test_children_are_patched_too(way: str, project: Path) -> None:
    (project / "parent.py").write_text(
        "import multiprocessing, subprocess, sys\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "def ask():\n    import late_lib\n    return late_lib.one()\n"
        f"if __name__ == '__main__':\n    {CHILDREN[way]}\n"
    )
    ran = started(project, "parent.py")
    assert (ran.returncode, ran.stdout) == (0, "patched 1\n"), ran.stderr


def test_a_spawned_worker_of_a_data_loader_is_patched_and_in_the_journal(project: Path) -> None:
    (project / "loading.py").write_text(
        "import torch\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, index):\n        import late_lib\n        return late_lib.one()\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context='spawn')\n"
        "    print(*next(iter(loader)))\n"
    )
    assert output(project, "loading.py", PATCHES_JOURNAL="journal") == "patched 1"
    kept = patches.read_journals(project / "journal")
    states = sorted(one.state for process in kept for one in process.applications)
    assert states[:1] == ["active"]  # the worker
    assert set(states[1:]) == {"pending"}  # its parent, and the resource tracker, which import no such thing
    assert kept.differences == ()


def test_ranks_of_torchrun_are_patched(project: Path) -> None:
    (project / "rank.py").write_text("import os, late_lib\nprint(os.environ['RANK'], late_lib.one(), flush=True)\n")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py")
    printed = output(project, *command, PATCHES_JOURNAL="journal")
    assert sorted(printed.splitlines()) == ["0 patched 1", "1 patched 1"]
    ranks = [process for process in patches.read_journals(project / "journal") if process.rank is not None]
    assert [(process.rank, *(one.state for one in process.applications)) for process in ranks] == [
        (0, "active"),
        (1, "active"),
    ]


def test_the_environment_can_be_made_in_python() -> None:
    with pytest.raises(patches.UnknownPatchError, match="no patch has the id"):
        environment("late.nothing")
    with pytest.raises(patches.PatchError, match="expected ids"):
        environment(base={})
    before = list(sys.path)
    made = environment("bitsandbytes.no-rewrap", base={"PYTHONPATH": "/a"})
    assert sys.path == before
    again = environment("torch.fsdp1-raw-reads", base=made)
    assert again["PATCHES_APPLY"] == "bitsandbytes.no-rewrap,torch.fsdp1-raw-reads"
    assert again["PYTHONPATH"] == made["PYTHONPATH"] == os.pathsep.join((str(ROOT / "patches" / "startup"), "/a"))
