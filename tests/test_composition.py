"""The fused layer under PyTorch's transforms: each keeps working, or gets the reference."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.composability import CELLS, NotMeasuredError
from lora_core import (
    ConfigError,
    LoRALinear,
    MergeError,
    UnsupportedLayerError,
    disabled,
    explain,
    inject,
    merge,
)
from lora_core.functional import fused_lora_linear


def layer(rank: int = 4, **options) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(40, 56), rank=rank, alpha=2 * rank, **options)
    nn.init.normal_(made.lora_B_default)
    return made


@pytest.mark.slow
# raised by Inductor's and forward-mode's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("cell", [name for name in CELLS if name != "tensor parallelism"])
def test_every_cell_of_the_composability_row_holds(cell):
    try:
        CELLS[cell]()
    except NotMeasuredError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [24, 512])  # one plan and the other
def test_checkpointing_gives_the_gradients_of_a_plain_call(reentrant, dropout, tokens):
    net = nn.Sequential(layer(dropout=dropout), nn.ReLU()).train()
    x = torch.randn(tokens, 40, requires_grad=True)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]

    def gradients(call):
        torch.manual_seed(5)
        call(x).square().sum().backward()
        found = [t.grad.clone() for t in inputs]
        for t in inputs:
            t.grad = None
        return found

    plain = gradients(net)
    again = gradients(lambda x: checkpoint(net, x, use_reentrant=reentrant))
    for g, e in zip(again, plain, strict=True):
        assert g.abs().max() > 0
        assert torch.equal(g, e)


def test_selective_checkpointing_that_keeps_products_is_right():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default}

    def policy(ctx, op, *args, **kwargs):
        keep = op in products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    net, x = layer(), torch.randn(24, 40, requires_grad=True)
    inputs = [x, net.lora_A_default, net.lora_B_default]
    plain = torch.autograd.grad(net(x).square().sum(), inputs)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
    for g, e in zip(torch.autograd.grad(y.square().sum(), inputs), plain, strict=True):
        assert_close(g, e, atol=1e-4, rtol=1e-4)


def test_a_functional_trace_is_made_of_plain_operations():
    from torch.fx.experimental.proxy_tensor import make_fx

    module, x = layer(), torch.randn(7, 40)
    operands = x, module.weight, module.bias, module.lora_A_default, module.lora_B_default
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(partial(fused_lora_linear, gain=2.0), tracing_mode=mode)(*operands)
        assert not any("lora_core" in str(node.target) for node in graph.graph.nodes)
        assert_close(graph(*operands), module(x))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_made_of_plain_operations(strict):
    module, x = layer().eval(), torch.randn(7, 40)
    program = torch.export.export(module, (x,), strict=strict)
    assert not any("lora_core" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), module(x))


# torch.jit is on its way out and says so
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_traced_module_computes_the_same():
    module, x = layer().eval(), torch.randn(7, 40)
    traced = torch.jit.trace(module, (x,))
    assert_close(traced(x[:3]), module(x[:3]))


class Marked(torch.Tensor):
    """A subclass that says so, and nothing more."""


def test_a_tensor_subclass_gets_the_reference_and_keeps_its_class():
    module = layer()
    x = torch.randn(7, 40).as_subclass(Marked)
    assert explain(module, x).form == "composed"
    assert "subclass" in explain(module, x).why
    got = module(x)
    assert type(got) is Marked
    assert_close(got.as_subclass(torch.Tensor), module(x.as_subclass(torch.Tensor)))


def test_a_jagged_batch_gets_the_reference():
    module = layer()
    rows = [torch.randn(3, 40), torch.randn(5, 40)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = module(nested)
    for part, x in zip(got.unbind(), rows, strict=True):
        assert_close(part, module(x))


def test_a_base_that_trains_gets_its_gradient():
    module = layer()
    module.weight.requires_grad_()
    x = torch.randn(7, 40)
    assert "the base or the gain takes a gradient" in explain(module, x).why
    module(x).sum().backward()
    assert_close(module.weight.grad, x.sum(0).expand(56, 40))


def test_explain_speaks_of_the_call_as_the_layer_would_make_it():
    module, x = layer().eval(), torch.randn(7, 40)
    with pytest.raises(
        ConfigError, match=r"^`x` must have shape \(\.\.\., 40\), but has \(7, 9\)\.$"
    ):
        explain(module, torch.randn(7, 9))
    with pytest.raises(
        ConfigError, match=r"^`x` must be a floating tensor, but is torch\.int64\.$"
    ):
        explain(module, torch.ones(7, 40, dtype=torch.int64))
    with pytest.raises(
        UnsupportedLayerError, match=r"^`layer` must carry an adapter, but is a bare"
    ):
        explain(nn.Linear(40, 56), x)
    with disabled(module):
        assert str(explain(module, x)) == "frozen: no adapter is active"
    merge(module)
    assert str(explain(module, x)) == "frozen: the adapters are merged into the weight"
    with disabled(module):
        assert "`disabled` shows the base" in explain(module, x).why
    module.train()
    with pytest.raises(MergeError, match=r"^A layer in training mode must be unmerged"):
        explain(module, x)


def test_autocast_inside_a_compiled_call_computes_in_its_dtype():
    torch._dynamo.reset()
    module, x = layer(), torch.randn(7, 40)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), module(x)
    assert got.dtype is torch.bfloat16
    assert_close(got, expected, atol=5e-2, rtol=5e-2)
    got.float().sum().backward()
    assert module.lora_A_default.grad.dtype is torch.float32


def test_a_compiled_layer_drops_out_and_takes_mixes_per_rank():
    torch._dynamo.reset()
    module = layer(dropout=0.5).train()
    x = torch.randn(64, 40)
    torch.compile(module, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert module.lora_A_default.grad.abs().max() > 0
    inject(module, rank=2, alpha=1, name="second", targets=nn.Linear)
    nn.init.normal_(module.lora_B_second)
    module.eval()
    assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_float32_factors_merge_into_a_float64_host_as_they_are_multiplied():
    host = nn.ModuleDict({"to_q": nn.Linear(40, 56, dtype=torch.float64)})
    inject(host, rank=4, dtype=torch.float32)
    nn.init.normal_(host["to_q"].lora_B_default)
    x = torch.randn(7, 40, dtype=torch.float64)
    apart = host["to_q"](x)
    merge(host.eval())
    assert_close(host["to_q"](x), apart, atol=1e-12, rtol=1e-12)


TENSOR_PARALLEL = """
    import sys
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, parallelize_module,
    )
    import lora_core

    def net():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.up, model.down = nn.Linear(8, 16), nn.Linear(16, 8)
        lora_core.inject(model, rank=2, targets=nn.Linear)
        for p in lora_core.parameters(model):
            nn.init.normal_(p)
        return model

    def run(rank, meeting):
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        try:
            compare()
        finally:
            # a group that outlives its process may abort it: its threads are never joined
            dist.destroy_process_group()

    def compare():
        x = torch.linspace(-1, 1, 24).view(3, 8)
        alone, model = net(), net()
        alone(x).square().sum().backward()
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        y = model(x)
        torch.testing.assert_close(y, alone(x))
        y.square().sum().backward()
        pairs = zip(lora_core.parameters(model), lora_core.parameters(alone), strict=True)
        for sharded, whole in pairs:
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-3)
        dist.barrier()  # neither leaves while the other still gathers

    if __name__ == "__main__":
        mp.spawn(run, (sys.argv[1],), nprocs=2)
        print("equal")
"""


@pytest.mark.slow
def test_an_ordinary_tensor_parallel_plan_gives_the_single_process_result(tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(textwrap.dedent(TENSOR_PARALLEL))
    done = subprocess.run(
        [sys.executable, str(script), (tmp_path / "meeting").as_uri()],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
