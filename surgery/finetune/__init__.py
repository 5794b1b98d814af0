"""Fine-tuning over what `surgery.qlora` returns: `job.run(Job(...))`; nothing here loads torch for a help text."""
