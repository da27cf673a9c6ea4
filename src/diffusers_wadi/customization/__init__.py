"""The training run of `training/train_dreambooth_lorad.py`: data, model, loop, checkpoints, upload. Extra ``train``."""
