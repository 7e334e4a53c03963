"""The engine: checkpoints in and out, calibration data, the pipeline, training, verification, evaluation, reports."""
