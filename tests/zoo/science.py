"""A graph network of molecules, dynamics and densities."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from .made import Made, package


def espaloma() -> Made:
    package("rdkit")
    expaloma = package("expaloma")
    features = package("expaloma.featurize")
    mol = package("rdkit.Chem").MolFromSmiles("CC(=O)Nc1ccc(O)cc1")
    x, senders, receivers, charge = features.graph_to_jax(features.from_rdkit_mol(mol))
    model = expaloma.load_eqx(expaloma.bundled_eqx_path())
    one_molecule = jnp.zeros(len(x), jnp.int32)
    return Made(
        model,
        (x, senders, receivers, one_molecule, charge),
        lambda m, x, s, r, one, q: m(x, s, r, one, 1, 0.0, q_ref=q),
    )


class _Field(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.net(y)


def neural_ode() -> Made:
    diffrax = package("diffrax")

    def program(field, y0s):
        def solve(y0):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                t0=0.0,
                t1=1.0,
                dt0=0.1,
                y0=y0,
                stepsize_controller=diffrax.PIDController(1e-4, 1e-6),
                saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 4)),
            ).ys

        return jax.vmap(solve)(y0s)

    field = _Field(eqx.nn.MLP(3, 3, 16, 2, jax.nn.tanh, key=jr.key(0)))
    return Made(field, (jr.normal(jr.key(1), (4, 3)),), program)


def fixed_point() -> Made:
    """The fixed point of a layer, with banax's implicit derivative."""
    solver, adjoint = package("banax.solver"), package("banax.adjoint")

    def program(layer, x):
        solve = solver.Picard(rtol=1e-7, max_steps=100)
        step = lambda z, layer, x: jnp.tanh(0.3 * layer(z) + x)
        find = adjoint.Implicit(solve, solve)
        return find((step, (layer, x), {}), jnp.zeros(6)).value

    layer = eqx.nn.Linear(6, 6, key=jr.key(0))
    return Made(layer, (jr.normal(jr.key(1), (6,)),), program)


def flow(make: str) -> Callable[[], Made]:
    def build():
        flows = package("flowjax.flows")
        base = package("flowjax.distributions").StandardNormal((3,))
        flow = getattr(flows, make)(jr.key(0), base_dist=base, flow_layers=2)
        return Made(flow, (jr.normal(jr.key(1), (4, 3)),), lambda f, x: f.log_prob(x))

    return build
