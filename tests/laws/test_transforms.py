"""What torch makes of an adapted model: functions of its tensors, graphs, and compiled code."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lora_core import scales
from tests.laws.zoo import ZOO, gradients, loss_of, trained_keys


def test_functional_call_uses_the_tensors_it_is_given(kind):
    model, other, x = kind.adapted().eval(), kind.inject(kind.bare(seed=11), seed=13), kind.sample()
    before = model(x)
    values = {n: t.detach().clone() for n, t in other.state_dict().items()}
    got = torch.func.functional_call(model, values, (x,))
    assert_close(got, other.eval()(x))
    assert torch.equal(model(x), before)
    # and the adapters alone
    mine = {n: values[n] for n in trained_keys(model)}
    twin = copy.deepcopy(model)
    twin.load_state_dict(mine, strict=False)
    got = torch.func.functional_call(model, mine, (x,))
    assert_close(got, twin(x))
    assert not torch.allclose(got, before)


# of kernels that vmap runs in a loop, the host's own
SLOW_VMAP = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@SLOW_VMAP
def test_per_sample_gradients_by_vmap_are_the_loops(kind):
    model, x = kind.adapted(torch.float64).eval(), kind.sample(4, torch.float64)
    kind.excuse("vmap")
    values = {n: model.get_parameter(n).detach() for n in trained_keys(model)}

    def loss(values, sample):
        return loss_of(torch.func.functional_call(model, values, (sample[None],)))

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for row in range(4):
        expected = gradients(model, x[row : row + 1])
        for name, gradient in zip(values, expected, strict=True):
            assert gradient.abs().max() > 0
            assert_close(got[name][row], gradient)


@SLOW_VMAP
def test_a_stack_of_models_runs_as_an_ensemble(kind):
    kind.excuse("vmap")
    models = [kind.inject(kind.bare(), seed=seed).eval() for seed in range(3)]
    x = kind.sample()
    params, buffers = torch.func.stack_module_state(models)

    def call(params, buffers):
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    got = torch.vmap(call)(params, buffers)
    expected = torch.stack([model(x) for model in models])
    assert not torch.allclose(expected[0], expected[1])
    assert_close(got, expected)


@pytest.mark.slow
def test_compiled_as_one_graph_it_computes_and_learns_the_same(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    kind.excuse("compile")
    torch._dynamo.reset()
    model, x = kind.adapted().eval(), kind.sample()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for strength in (1.0, -2.0):
        scales(model, default=strength)
        assert_close(compiled(x), model(x))
        for mine, theirs in zip(gradients(model, x, compiled), gradients(model, x), strict=True):
            assert theirs.abs().max() > 0
            assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    # another strength is not another graph
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_an_exported_program_computes_the_same_for_every_batch(kind):
    export(kind, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-conv1d", "attention-whole", "gru"])
def test_so_does_a_strictly_exported_one_which_is_compiled(name):
    export(ZOO[name], strict=True)


def export(kind, *, strict):
    model, x = kind.adapted().eval(), kind.sample()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert not any("lora_core" in str(node.target) for node in program.graph.nodes)
    assert sorted(program.state_dict) == sorted(model.state_dict())
    for batch in (3, 5):
        x = kind.sample(batch)
        assert_close(program.module()(x), model(x))


# torch.jit is on its way out and says so; of a host's own shape checks it warns as well
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_module_computes_the_same_for_every_batch(kind):
    model = kind.adapted().eval()
    with torch.no_grad():  # with gradients torch's own attention takes another path the second time
        traced = torch.jit.trace(model, (kind.sample(),))
    for batch in (3, 5):
        x = kind.sample(batch)
        assert_close(traced(x), model(x))
    assert sorted(traced.state_dict()) == sorted(model.state_dict())


def by_vmap(model, x):
    return torch.vmap(lambda sample: model(sample[None]))(x)


def compiled(model, x):
    return torch.compile(model, fullgraph=True, backend="eager")(x)


BARE = {"vmap": by_vmap, "compile": compiled}


def test_what_a_kind_is_excused_from_its_bare_model_cannot_do_either(kind):
    for what in kind.excused.keys() & BARE.keys():
        with pytest.raises(Exception, match=r"\w"):
            BARE[what](kind.bare().eval(), kind.sample())
    torch._dynamo.reset()
