"""What measures DELTA: policies, tasks, evaluation, calibration, inspection (extra ``lab``)."""
