"""The terms that are added to the NLL. A term says which rows it needs and sums its penalty over them.

To add one: a class with `alpha`, `schedule`, `sampling`, `select` and `total` like LogitAlignment's, or with `alpha`
and `penalty` (ParameterTerm), and a YAML file in selfaug/conf/alignment/ or method/. Terms on hidden states are
in hidden.py.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, get_args

from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.decoder import Head
from selfaug.objective.batch import TokenBatch
from selfaug.objective.rows import POSITIONS, Position, alignment_rows, check_boundary
from selfaug.objective.sampling import Rows, RowSampling
from selfaug.objective.schedules import AlphaSchedule, check_alpha
from selfaug.ops import Divergence, linear_kl


class States(NamedTuple):
    """What a term is given of its N rows.

    tuned, reference: [N, d] last hidden states; only `tuned` has a graph. next_tokens: [N] int64, the token that each
    row predicts. weights: [N] of the rows in the sum, None for 1.
    """

    tuned: Tensor
    reference: Tensor
    next_tokens: Tensor
    weights: Tensor | None = None


class Term(Protocol):
    """alpha * (sum of the penalty over its rows) / (number of its rows in the whole optimiser step)."""

    @property
    def alpha(self) -> float:
        """Its weight in the loss, where the schedule starts from."""
        ...

    @property
    def schedule(self) -> AlphaSchedule | None:
        """How the weight changes during the training; None: not at all."""
        ...

    @property
    def sampling(self) -> RowSampling:
        """Which of its rows are used in a training step."""
        ...

    def select(self, batch: TokenBatch) -> Tensor:
        """[B, T] bool: the rows it is taken over."""
        ...

    def total(self, states: States, head: Head) -> Tensor:
        """The penalty summed over the rows, a scalar."""
        ...


class ParameterTerm(Protocol):
    """alpha * penalty, where the penalty depends on the trained weights and not on the tokens.

    May also have `start(model)`, called once with the weights that the training starts from, also where it then goes on
    from a checkpoint (raises UserError where the model has nothing that the penalty could be taken of);
    `held_bytes(model)`, what it keeps beside the weights, for the memory plan; and `prepare` and `use`, where it needs
    data first (preparation.py).
    """

    @property
    def alpha(self) -> float:
        """Its weight in the loss."""
        ...

    def penalty(self, model: nn.Module) -> Tensor:
        """A scalar with a graph to the trained weights. Called once in every step, in every process, with the model
        whole in each: sharded weights have to be gathered (lora_pairs.whole)."""
        ...


class TokenWeights(Protocol):
    """How much each response token counts in what is minimised; the NLL counts all alike."""

    def __call__(self, nll: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """[N] weights without a graph, of the N learned rows: their nll [N] and last hidden states [N, d]."""
        ...


@dataclass(frozen=True)
class LogitAlignment:
    """SelfAug's term: KL between base and tuned next-token distributions (paper section 3.3).

    Args:
        alpha: its weight; the paper uses 0.5 and recommends 0.3 to 0.5. At 0 the KL is measured without a gradient,
            and training is plain LoRA, bit for bit.
        position: input_logits (SelfAug), output_logits, all_logits, document_logits or question_logits.
        divergence: kl_base_tuned = KL(base || tuned), as the official code computes and our default;
            kl_tuned_base = KL(tuned || base), as the paper's formula says. See selfaug/ops/linear_kl.py.
        boundary: keep the last prompt position among the input rows.
        official: take the official code's rows, padding included (input_logits only).
        mask_target: leave the token to be learned out of both distributions (output_logits only): the KL then says
            nothing about it and does not pull against the NLL (target-masked KL, arXiv 2605.29498).
        rows, share: use a share of the rows in each training step, weighted so that the loss is the same in
            expectation; see selfaug/objective/sampling.py.
        schedule: how alpha changes during the training; see selfaug/objective/schedules.py.
        source: align the examples of this data source only (task, or one of data.mixture); None for all.

    Raises:
        UserError: a value outside its range.
    """

    alpha: float = 0.5
    position: Position = "input_logits"
    divergence: Divergence = "kl_base_tuned"
    boundary: bool = True
    official: bool = False
    rows: Rows = "all"
    share: float = 1.0
    mask_target: bool = False
    schedule: AlphaSchedule | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            raise UserError(f"alignment.position={self.position} is unknown: set it to one of {', '.join(POSITIONS)}.")
        check_alpha(self.alpha, self.schedule)
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise UserError(f"alignment.divergence={self.divergence} is unknown: set it to one of {known}.")
        if self.official and (self.position != "input_logits" or not self.boundary):
            raise UserError(
                "alignment.official=true means the official code's rows: set alignment.position=input_logits and "
                "alignment.boundary=true with it."
            )
        check_boundary(self.boundary, self.position, self.position)
        if self.official and self.source is not None:
            raise UserError(
                "alignment.official=true counts padding, which belongs to no data source: leave the term's source out."
            )
        if self.mask_target and self.position != "output_logits":
            raise UserError(
                "alignment.mask_target=true leaves out the response token that a row predicts, which only output rows "
                "have: set alignment.position=output_logits with it."
            )
        if not self.sampling.everything and self.official:
            raise UserError(
                "alignment.official=true counts padding, which is never sampled: set alignment.rows=all with it."
            )

    @property
    def sampling(self) -> RowSampling:
        return RowSampling(self.rows, self.share)

    def select(self, batch: TokenBatch) -> Tensor:
        if self.official and batch.packed:
            raise UserError(
                "alignment.official=true counts padding, which a packed batch does not have: set data.packing=false."
            )
        rows = alignment_rows(
            batch.roles, self.position, boundary=self.boundary, official=self.official, last=batch.last
        )
        return rows if self.source is None else rows & batch.of(self.source)

    def total(self, states: States, head: Head) -> Tensor:
        return linear_kl(
            states.tuned, states.reference, **head.arguments(), divergence=self.divergence, reduction="sum",
            row_weights=states.weights, excluded=states.next_tokens if self.mask_target else None,
        )  # fmt: skip
