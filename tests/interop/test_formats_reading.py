"""What the peers write, with random settings, gives their outputs on a model of ours."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import lora_core

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
lycoris = pytest.importorskip("lycoris")
loralib = pytest.importorskip("loralib")

pytestmark = [
    pytest.mark.interop,
    # the peers' own, of one another and of torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FEW = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=12
)
RANKS = st.integers(1, 6)
ALPHAS = st.sampled_from([0.3, 1.0, 2.0, 5.0, 8.0])


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, under names with dots, digits and underscores."""

    def __init__(self, wide: int = 12, narrow: int = 10) -> None:
        super().__init__()
        self.emb, self.q = nn.Embedding(11, wide), nn.Linear(wide, wide)
        self.k_proj = nn.Linear(wide, narrow)
        self.q_2 = nn.ModuleList([nn.Linear(narrow, wide), nn.Linear(wide, wide, bias=False)])
        self.conv, self.norm_1 = nn.Conv1d(wide, 8, 3, padding=1), nn.LayerNorm(wide)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.q(self.emb(ids))
        x = self.norm_1(self.q_2[1](self.q_2[0](torch.tanh(self.k_proj(x)))))
        out: Tensor = self.head(torch.tanh(self.conv(x.mT).mT))
        return out


def moved(parameters: Any) -> None:
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)


def same(model: nn.Module, x: Tensor, wanted: Tensor, base: Tensor) -> None:
    """The outputs agree, and are not those of the base."""
    bound = 2e-5 * float(wanted.abs().max())
    with torch.no_grad():
        assert_close(model(x), wanted, rtol=0, atol=bound)
    assert float((wanted - base).abs().max()) > 100 * bound


@st.composite
def peft_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = ["q", "k_proj", "q_2.0", "q_2.1", "conv", "emb", "head"]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    config: dict[str, Any] = {
        "r": draw(RANKS),
        "lora_alpha": draw(ALPHAS),
        "target_modules": targets,
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "lora_only", "all"])),
    }
    if draw(st.booleans()):
        config["rank_pattern"] = {draw(st.sampled_from(targets)).replace(".", r"\."): draw(RANKS)}
        config["alpha_pattern"] = {draw(st.sampled_from(targets)).replace(".", r"\."): draw(ALPHAS)}
    whole = draw(st.lists(st.sampled_from(["head", "norm_1"]), max_size=2, unique=True))
    config["modules_to_save"] = [name for name in whole if name not in targets] or None
    return config


@FEW
@given(config=peft_settings(), wide=st.integers(7, 12), data=st.integers(0, 2**16))
def test_pefts_folders(config: dict[str, Any], wide: int, data: int, tmp_path: Path) -> None:
    torch.manual_seed(data)
    base, ids = Net(wide).eval(), torch.randint(0, 11, (3, 7))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    moved(theirs.parameters())
    folder = tmp_path / "adapter"
    theirs.save_pretrained(folder)
    with torch.no_grad():
        wanted, plain = theirs(ids), base(ids)
    lora_core.load(base, folder)
    same(base, ids, wanted, plain)
    lora_core.eject(base)
    with torch.no_grad():
        assert torch.equal(base(ids), plain)


class Pictures(nn.Module):
    """Linear layers and convolutions, as LyCORIS adapts them."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.q, self.b_1 = (
            nn.Linear(wide, 12),
            nn.ModuleList([nn.Linear(12, 10), nn.Linear(10, 12)]),
        )
        self.conv, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.norm_2 = nn.LayerNorm(12), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b_1[1](torch.tanh(self.b_1[0](self.q(x)))))
        out: Tensor = self.c2(torch.tanh(self.norm_2(self.conv(x.reshape(-1, 3, 2, 2)))))
        return out


LYCORIS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "dora": {"dora_wd": True, "wd_on_output": True},
    "dora and tucker": {"dora_wd": True, "wd_on_output": True, "use_tucker": True},
    "dora over inputs": {"dora_wd": True, "wd_on_output": False},
    "dora over inputs and tucker": {"dora_wd": True, "wd_on_output": False, "use_tucker": True},
    "rslora": {"rs_lora": True},
    "scalar": {"use_scalar": True},
    "norms": {"train_norm": True},
}


@pytest.mark.parametrize("kind", LYCORIS)
@FEW
@given(wide=st.integers(5, 12), rank=RANKS, conv=RANKS, alpha=ALPHAS, seed=st.integers(0, 2**16))
def test_lycoris_files(
    kind: str, wide: int, rank: int, conv: int, alpha: float, seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    base, x = Pictures(wide).eval(), torch.randn(3, 4, wide)
    theirs = copy.deepcopy(base)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    network = lycoris.create_lycoris(
        theirs,
        1.0,
        linear_dim=rank,
        linear_alpha=alpha,
        conv_dim=conv,
        conv_alpha=alpha,
        algo="lora",
        **LYCORIS[kind],
    )
    network.apply_to()
    moved(network.parameters())
    network.eval()
    with torch.no_grad():
        wanted, plain = theirs(x), base(x)
    file = tmp_path / "adapter.safetensors"
    state = {k: v.detach().clone().contiguous() for k, v in network.state_dict().items()}
    safetensors.torch.save_file(state, file)
    report = lora_core.load(base, file)
    assert report.format == "lycoris"
    same(base, x, wanted, plain)


@FEW
@given(
    rank=RANKS,
    alpha=st.integers(1, 8),
    enabled=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    seed=st.integers(0, 2**16),
)
def test_loralib_files(
    rank: int, alpha: int, enabled: tuple[bool, ...], seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)

    def build(*, adapted: bool) -> nn.Module:
        if not adapted:
            return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 6))
        return nn.Sequential(
            loralib.Embedding(9, 8, r=rank, lora_alpha=alpha),
            loralib.MergedLinear(8, 12, r=rank, lora_alpha=alpha, enable_lora=list(enabled)),
            loralib.Linear(12, 6, r=rank, lora_alpha=alpha),
        )

    theirs, ids = build(adapted=True).train(), torch.randint(0, 9, (4, 3))
    loralib.mark_only_lora_as_trainable(theirs)
    moved(theirs.parameters())
    base = build(adapted=False)
    base.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items() if "lora_" not in k})
    with torch.no_grad():
        wanted, plain = theirs(ids), base(ids)
    file = tmp_path / "adapter.pt"
    torch.save(loralib.lora_state_dict(theirs), file)
    lora_core.load(
        base, file, alpha=float(alpha), allow_pickle=True, enable_lora={"1": list(enabled)}
    )
    same(base, ids, wanted, plain)


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_files(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
            rank_pattern={"proj_in": 2},
            alpha_pattern={"proj_in": 7},
            use_dora=dora,
        )
    )
    moved(theirs.parameters())
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 12)
    with torch.no_grad():
        wanted, plain = theirs(x, t, y).sample, unet(x, t, y).sample
    state = peft.utils.get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"]
    pipeline = diffusers.StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=state,
            unet_lora_adapter_metadata=config.to_dict(),
        )
    report = lora_core.load({"unet": unet}, tmp_path / "pytorch_lora_weights.safetensors")
    assert report.format == "diffusers"
    with torch.no_grad():
        got = unet(x, t, y).sample
    bound = 1e-4 * float(wanted.abs().max())
    assert_close(got, wanted, rtol=0, atol=bound)
    assert float((wanted - plain).abs().max()) > 10 * bound
