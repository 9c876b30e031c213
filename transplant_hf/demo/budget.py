"""How much of everything the demo spends: text, vocabulary, model sizes and training steps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ..errors import ConfigurationError


@dataclass(frozen=True)
class DemoBudget:
    """Sizes and step counts of the demo.

    The defaults fit a first run into about three minutes on two CPU cores; tests shrink them.

    Args:
        seed: Seed of every random choice.
        english_characters: Most English text to train upon, in characters.
        source_characters: Most Python source code to train upon, in characters.
        held_out_characters: Least held-out text of each domain, in characters; documents stay whole.
        vocabulary_size: Number of tokens, the two special ones and the 256 bytes included.
        hidden_size: Width of the recipient.
        intermediate_size: Width of the recipient's feed-forward blocks.
        recipient_layers: Number of decoder layers of the recipient.
        attention_heads: Number of attention heads, which must divide `hidden_size`.
        context: Length of training and evaluation blocks, in tokens.
        batch_size: Number of blocks per training step.
        recipient_steps: Training steps of the recipient.
        recipient_learning_rate: Peak learning rate of the recipient.
        donor_layers: Number of layers that are inserted.
        donor_position: Number of recipient layers that run before the donor.
        donor_steps: Training steps of the donor.
        donor_learning_rate: Peak learning rate of the donor.
        replay_fraction: Share of each donor batch that is English text, against forgetting; 0 to 1.
        new_tokens: Number of tokens to generate for each prompt.

    Raises:
        ConfigurationError: A number is out of its range or does not fit another one.
    """

    seed: int = 0
    english_characters: int = 1_500_000
    source_characters: int = 1_500_000
    held_out_characters: int = 40_000
    vocabulary_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    recipient_layers: int = 6
    attention_heads: int = 4
    context: int = 128
    batch_size: int = 8
    recipient_steps: int = 700
    recipient_learning_rate: float = 8e-3
    donor_layers: int = 2
    donor_position: int = 5
    donor_steps: int = 400
    donor_learning_rate: float = 1e-2
    replay_fraction: float = 0.25
    new_tokens: int = 60

    def __post_init__(self) -> None:
        if self.vocabulary_size < 258:
            raise ConfigurationError("vocabulary_size must be at least 258: 256 bytes and 2 special tokens.")
        if self.hidden_size % self.attention_heads or (self.hidden_size // self.attention_heads) % 2:
            raise ConfigurationError("attention_heads must divide hidden_size into heads of even width.")
        if not 1 <= self.donor_layers <= self.recipient_layers:
            raise ConfigurationError("donor_layers must lie between 1 and recipient_layers.")
        if not 0 <= self.donor_position <= self.recipient_layers:
            raise ConfigurationError("donor_position must lie between 0 and recipient_layers.")
        if not 0.0 <= self.replay_fraction < 1.0:
            raise ConfigurationError("replay_fraction must be at least 0 and below 1.")
        if min(self.context, self.batch_size, self.recipient_steps, self.donor_steps, self.new_tokens) < 1:
            raise ConfigurationError("context, batch_size, new_tokens and both step counts must be at least 1.")

    def fingerprint(self, *texts: str) -> str:
        """Digest of the budget and of the texts, by which a finished stage is recognised.

        Args:
            *texts: Further strings that the result depends on.

        Returns:
            64 hexadecimal digits.
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()
