"""Train a network and bring it to int8, as the configuration in conf/ says.

python train.py
python train.py mode=pt2e model=resnet20 data=cifar10
python train.py -m mode=eager,fx,pt2e seed=0,1,2
"""

import hydra
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from qat_lightning import app
from qat_lightning.evaluate import evaluate_variants


def train(cfg: DictConfig) -> tuple[dict[str, float], app.Objects]:
    """Fit, convert and compare.

    Args:
        cfg: The composed configuration.

    Returns:
        Every metric of the comparison, and the objects of the run.
    """
    app.check(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = app.build(cfg)
    app.log_configuration(cfg, run.loggers)
    run.trainer.fit(run.model, datamodule=run.datamodule, ckpt_path=cfg.ckpt_path)
    metrics = evaluate_variants(run.trainer, run.model, datamodule=run.datamodule)
    app.close(run.loggers)
    return metrics, run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run `train`, and explain what is wrong with the configuration in one panel."""
    app.quiet()
    with app.readable_errors():
        train(cfg)


if __name__ == "__main__":
    main()
