"""Training: one step as one graph, and the run around it.

`run.train` checks the configuration and the output folder, then builds and starts a `Trainer`.

- `Trainer` (trainer.py) owns the loop over epochs and steps, and the run's files.
- `TrainLoader` (train_loader.py) owns the training images: the batches of an epoch, their mixing.
- `TrainingSetup` (setup.py) owns what is built once: the step, the learning rates, frozen cells.
- `TrainStep` (train_step.py) owns everything that a step changes: weights, optimizer moments,
  moving average, loss scale and step number, as parameters of one graph.
- `Progress` (state.py) is everything else that a saved state needs; resume.py restores both.
"""
