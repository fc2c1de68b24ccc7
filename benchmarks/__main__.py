"""The benchmarks: ``python -m benchmarks NAME``."""

from benchmarks.bench import bench

if __name__ == "__main__":
    bench(prog_name="python -m benchmarks")
