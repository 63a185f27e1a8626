"""Hydra takes sweepers from this namespace alone. Nothing here, or imported from here, may import anything heavy:
every program that uses Hydra imports it when it starts."""

from selfaug.run import optuna_sweeper


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """hydra/sweeper=selfaug_optuna"""
