"""Fine-tuning over what `surgery.qlora` returns: data in, an adapter, its metrics and a summary out.

`surgery.finetune.job` is the way in (`Job`, `run`). Each other file does one thing and takes plain values, so
that a script with a loop of its own can use the parts: `dataset`, `batches`, `loss`, `schedule`, `loop`. Nothing
is imported here, so that the command line can print its help without loading torch.
"""
