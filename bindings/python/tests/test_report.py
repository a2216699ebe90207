"""Reports of one's own training loops."""

import pytest

import polder


def test_own_logs_are_compared(tmp_path):
    for name, shift in (("sam", 0.02), ("sgd", 0.0)):
        for seed in range(2):
            log = polder.RunLog(tmp_path / f"{name}-{seed}", name, lr=0.1, batch_size=128, seed=seed)
            for epoch in range(1, 4):
                accuracy = 0.5 + 0.1 * epoch + shift + 0.001 * seed
                log.epoch(
                    test_accuracy=accuracy, test_loss=1 / epoch, train_loss=float("nan"), lr=0.1, step=10 * epoch,
                    seconds=2.0 * epoch, images_per_second=100.0, numbers={"a": 1.5, "b": float("inf")},
                )  # fmt: skip
    page = polder.report(sorted(tmp_path.iterdir()), tmp_path / "page.html")
    text = page.read_text()
    assert page == tmp_path / "page.html" and "SAM" in text and "82" in text
    polder.RunLog(tmp_path / "other", "sam", name="ünï 😀", rho=float("inf")).epoch(test_accuracy=0.5)
    polder.report(tmp_path / "other")
    with pytest.raises(TypeError, match="alpha: None, expected a text"):
        polder.RunLog(tmp_path / "none", "sam", alpha=None)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        polder.RunLog(tmp_path / "sam-0", "sam")
    with pytest.raises(OSError, match="nowhere"):
        polder.report(tmp_path / "nowhere")
