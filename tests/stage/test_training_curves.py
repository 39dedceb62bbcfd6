import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stagesweep.stage.training_curves import training


def picture(figure: Figure) -> None:
    """Draw it, so that errors at draw time fail the test."""
    figure.canvas.draw()


def texts(figure: Figure) -> str:
    found = [text.get_text() for ax in figure.axes for text in (ax.title, *ax.texts)]
    return "\n".join([figure.get_suptitle(), *found])


def history(epochs: int = 5) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    return pd.DataFrame(
        {"epoch": epoch, "train_loss": 9 / epoch, "val_loss": 10 / epoch, "lr": 0.01 / epoch}
    )


def test_every_fit_has_a_column_of_curves() -> None:
    second = history().assign(train_kl=0.5, val_kl=[np.nan, 0.4, np.nan, 0.3, np.nan])
    figure = training({"pretrain": history(), "joint": second})
    picture(figure)
    assert len(figure.axes) == 6
    assert "joint (5 epochs)" in texts(figure)
    assert figure.axes[1].get_title() == "joint (5 epochs)"
    # A term of one fit alone is named beside its curve.
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "total loss",
        "",
        "",
        "kl",
        "learning rate",
        "",
    ]
