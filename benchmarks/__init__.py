"""Measurements of DELTA beside its peers, each in one run and on one machine.

python -m benchmarks.cpu          decode steps and peak memory on the CPU, beside Transformers
python -m benchmarks.kernels      decode attention on a GPU, beside other kernels
python -m benchmarks.e2e          whole vLLM engines on a GPU, stock beside DELTA
python -m benchmarks.serve        real vLLM servers under load on a GPU, stock and with DELTA
python -m benchmarks.soak         many requests through vLLM with DELTA, a third of them aborted
python -m benchmarks.smoke        what became of the smoke tests with each release of vLLM
python -m benchmarks.calibration  calibration of the embedded model, and its plan beside others
python -m benchmarks.evaluation   the evaluation's own speed, batched beside one at a time
python -m benchmarks.policies     DELTA and its peers on a real model: needles, tracking, texts
python -m benchmarks.lossless     lossless mode beside full attention: tokens, acceptance, speed
python -m benchmarks.clsa         CLSA beside YOCO and a Transformer of one size, on a GPU
python -m benchmarks.memory       caches on one GPU: step time, bytes, the longest context that fits

Each has --help. CONTRIBUTING.md describes the result files.
"""
