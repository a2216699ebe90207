import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "tests" / "fixtures")]

if importlib.util.find_spec("torch") is None:
    # NumPy's users have no PyTorch: the rest of the package works without it.
    collect_ignore = ["test_methods.py", "test_optimizer.py", "test_curvature.py"]
else:
    import torch

    # The models are small: threads of PyTorch would wait for each other.
    torch.set_num_threads(1)
