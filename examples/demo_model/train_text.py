"""Trains the text tower alone, so that its output says in plain linear terms which picture a caption asks for.

Left to the UNet, the tower would learn this only through the noise of the diffusion loss, a thousand times slower.
Here a linear head reads the picture's latents off every position from the end token on (the causal mask lets those
see the whole caption), and the tower is then frozen for the UNet. The empty caption is taught the mean picture.

A second run goes on with the tower of the first and keeps the head fixed. The meaning of the tower's output then
stays the same, so a UNet that is already training can change over to the better tower.

    python -m examples.demo_model.train_text --prepared /tmp/demo/coloured --steps 3000 --threads 1
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo_model.captions import TEMPLATES, Subject, article, build_subjects, random_caption
from examples.demo_model.glyphs import load_glyphs
from examples.demo_model.training import learning_rate_factor, set_learning_rate

# Which captions a run sees.
_DRAWS = random.Random(0)


@dataclass(frozen=True)
class TextRecipe:
    """What the text tower is and how it is trained."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch: int = 64
    learning_rate: float = 2e-3
    warm_up: float = 0.03
    weight_decay: float = 0.01
    empty_captions: float = 0.05
    report_every: int = 100


def build_text_tower(recipe: TextRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the untrained CLIP text tower for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        projection_dim=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids, padded to the tower's full length as Stable Diffusion does."""
    length = tokenizer.model_max_length
    encoded = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    tokens: torch.Tensor = encoded.input_ids
    return tokens


def choose_captions(subjects: Sequence[Subject], chosen: torch.Tensor, empty_share: float) -> list[str]:
    """A random caption for each chosen picture, some of them empty."""
    captions = [random_caption(subjects[index], _DRAWS) for index in chosen.tolist()]
    return ["" if _DRAWS.random() < empty_share else caption for caption in captions]


def reading_loss(read: torch.Tensor, targets: torch.Tensor, after_end: torch.Tensor) -> torch.Tensor:
    """Squared error of what is read at the positions from the end token on."""
    error = (read - targets.unsqueeze(1)).square().mean(dim=2)
    return error[after_end].mean()


def train(
    tower: CLIPTextModel,
    head: nn.Linear,
    tokenizer: CLIPTokenizer,
    subjects: Sequence[Subject],
    targets: torch.Tensor,
    steps: int,
) -> None:
    """Trains tower and head to read off `targets`, one row per subject."""
    recipe = TextRecipe()
    parameters = [parameter for parameter in (*tower.parameters(), *head.parameters()) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    popularity = torch.tensor([subject.weight for subject in subjects])
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, recipe.learning_rate * learning_rate_factor(step / steps, recipe.warm_up))
        chosen = torch.multinomial(popularity, recipe.batch, replacement=True)
        captions = choose_captions(subjects, chosen, recipe.empty_captions)
        empty = torch.tensor([not caption for caption in captions])
        tokens = tokenize(tokenizer, captions)
        wanted = targets[chosen].masked_fill(empty.unsqueeze(1), 0.0)
        loss = reading_loss(head(tower(tokens).last_hidden_state), wanted, tokens == tokenizer.eos_token_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % recipe.report_every == 0:
            print(f"step {step} loss {float(loss.detach()):.4f}", flush=True)


@torch.no_grad()
def fit_head(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, subjects: Sequence[Subject], targets: torch.Tensor
) -> nn.Linear:
    """The head that reads an already trained tower best: ridge regression over the main names."""
    tokens = tokenize(tokenizer, [subject.names[0] for subject in subjects])
    hidden = torch.cat([tower(chunk).last_hidden_state[:, -1] for chunk in tokens.split(128)]).double()
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    gram = hidden.T @ hidden + 1e-2 * torch.eye(hidden.shape[1])
    solution = torch.linalg.solve(gram, hidden.T @ targets.double()).float()
    head = nn.Linear(tower.config.hidden_size, targets.shape[1])
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])
    return head.requires_grad_(False)


@torch.no_grad()
def measure(
    tower: CLIPTextModel, head: nn.Linear, tokenizer: CLIPTokenizer, subjects: Sequence[Subject], targets: torch.Tensor
) -> dict[str, float]:
    """For every template, the share of main names whose reading is nearest to their own picture."""
    shares = {}
    for template, _ in TEMPLATES:
        captions = [template.format(subject.names[0], a=article(subject.names[0])) for subject in subjects]
        read = torch.cat(
            [head(tower(chunk).last_hidden_state[:, -1]) for chunk in tokenize(tokenizer, captions).split(128)]
        )
        nearest = torch.cdist(read, targets).argmin(dim=1)
        shares[template] = float((nearest == torch.arange(len(subjects))).float().mean())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prepared", type=Path, required=True, help="the folder add_colour.py wrote; the tower goes there"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--train-head", action="store_true", help="in a second run too: the targets have changed")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.prepared / "tokenizer")
    latents = torch.load(arguments.prepared / "latents.pt", weights_only=True).flatten(1)
    targets = latents - latents.mean(dim=0)
    subjects = build_subjects(load_glyphs())
    tower = build_text_tower(TextRecipe(), tokenizer)
    head = nn.Linear(TextRecipe().width, targets.shape[1])
    if (arguments.prepared / "text_tower.pt").exists():
        tower.load_state_dict(torch.load(arguments.prepared / "text_tower.pt", weights_only=True))
        head = fit_head(tower, tokenizer, subjects, targets).requires_grad_(arguments.train_head)
    train(tower, head, tokenizer, subjects, targets, arguments.steps)
    torch.save(tower.state_dict(), arguments.prepared / "text_tower.pt")
    for template, share in measure(tower, head, tokenizer, subjects, targets).items():
        print(f"{100 * share:.1f} % {template}")


if __name__ == "__main__":
    main()
