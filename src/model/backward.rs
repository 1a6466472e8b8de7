//! Walking back through a decoder, unit by unit.
//!
//! Only the input of every unit is kept, unless more is asked for; each unit is computed again on the way back, so that
//! no graph ever spans more than one. Memory beyond the weights: one input a unit, one unit's activations, one chunk of
//! logits.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::adapter::LowRank;
use super::block::Block;
use super::decoder::{Decoder, Pass};
use super::params::{BlockParam, Projection};
use super::residual::Ending;
use super::unit::{Part, Unit};
use crate::error::{Error, Result};

/// A forward pass through a chain of gated units that can be walked back.
///
/// Unit `u` with gate `g` takes `x` to `x + g · (u(x) − x)`: 1 is the original, 0 removes it.
#[derive(Debug)]
pub struct Walk<'a> {
    decoder: &'a Decoder,
    pass: Pass<'a>,
    units: &'a [Unit],
    gates: Vec<f64>,
    kept: Vec<Kept>,
    output: Tensor,
}

/// What is kept of a unit on the way forward.
#[derive(Debug)]
enum Kept {
    /// Its input: it is computed again on the way back.
    Input(Tensor),
    /// All that it computed.
    Graph(UnitGraph),
}

impl<'a> Walk<'a> {
    /// Runs `units` over `(batch, seq)` ids, each under its gate, keeping every unit's input.
    ///
    /// # Errors
    /// As many gates as units are needed; [`Error::Quantized`] where there is no way back; or a failed computation.
    pub fn forward(decoder: &'a Decoder, units: &'a [Unit], gates: &[f64], ids: &Tensor) -> Result<Self> {
        Self::forward_keeping(false, decoder, units, gates, ids)
    }

    /// As [`forward`](Self::forward), without gradient checkpointing: the activations of all units are kept, so that the
    /// way to the gates' gradients, which are the same, computes nothing again.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_keeping_activations(
        decoder: &'a Decoder,
        units: &'a [Unit],
        gates: &[f64],
        ids: &Tensor,
    ) -> Result<Self> {
        Self::forward_keeping(true, decoder, units, gates, ids)
    }

    fn forward_keeping(
        activations: bool,
        decoder: &'a Decoder,
        units: &'a [Unit],
        gates: &[f64],
        ids: &Tensor,
    ) -> Result<Self> {
        if gates.len() != units.len() {
            return Err(Error::argument(
                "gates",
                gates.len(),
                format!("one for each of {} units", units.len()),
            ));
        }
        decoder.check_not_quantized()?;
        let pass = decoder.pass(0, ids.dims2()?.1)?;
        // On a thread of the pool, as the way back: one of hundreds of small operations, on tensors that the thread that
        // made them gives back.
        let (kept, output) = rayon::scope(|_| {
            let mut x = decoder.embed(ids, &pass)?.detach();
            let mut kept = Vec::with_capacity(units.len());
            for (&unit, &gate) in units.iter().zip(gates) {
                let block = decoder.block(unit.block)?;
                if activations && gate != 0.0 {
                    let graph = block.unit_graph(unit, &x, &pass)?;
                    x = graph.gated(gate, &pass)?;
                    kept.push(Kept::Graph(graph));
                } else {
                    let next = block.gated(unit.part, gate, &x, &pass)?;
                    kept.push(Kept::Input(std::mem::replace(&mut x, next)));
                }
            }
            Ok::<_, Error>((kept, x))
        })?;
        Ok(Self { decoder, pass, units, gates: gates.to_vec(), kept, output })
    }

    /// The state after the last unit, before the final norm: `(batch, seq, hidden)`.
    #[must_use]
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// From the gradient of the loss with respect to the output to its gradient with respect to every gate:
    /// `∂L/∂g = ⟨∂L/∂x_out, u(x) − x⟩`. Gates whose place is not `wanted` get 0; where such a one removes its unit,
    /// that unit never runs.
    ///
    /// # Errors
    /// A failed computation.
    pub fn gate_gradients(self, upstream: &Tensor, wanted: impl Fn(usize) -> bool) -> Result<Vec<f64>> {
        let Self { decoder, pass, units, gates, kept, .. } = self;
        let gates: Vec<Gate> = gates
            .into_iter()
            .enumerate()
            .map(|(place, value)| Gate { value, wanted: wanted(place) })
            .collect();
        rayon::scope(|_| {
            let mut upstream = upstream.detach();
            let mut gradients = vec![0.0; units.len()];
            let walked = gradients.iter_mut().zip(units).zip(gates).zip(kept).rev();
            for (((gradient, &unit), gate), kept) in walked {
                (*gradient, upstream) = match kept {
                    Kept::Input(x) => {
                        decoder.block(unit.block)?.gated_back(unit, gate, &x, &upstream, &pass)?
                    }
                    Kept::Graph(graph) => graph.gated_back(gate, &upstream, &pass)?,
                };
            }
            Ok(gradients)
        })
    }

    /// From the gradient of the loss with respect to the output to its gradients with respect to every matrix, given
    /// to `visit` unit by unit, last to first, in the order of [`Block::matrices`]. Units are whole blocks, and every
    /// gate is 1.
    ///
    /// # Errors
    /// What `visit` fails with, a half unit, another gate, or a failed computation.
    pub fn weight_gradients(
        mut self,
        upstream: &Tensor,
        mut visit: impl FnMut(usize, Vec<Tensor>) -> Result<()>,
    ) -> Result<()> {
        if let Some(gate) = self.gates.iter().find(|gate| (**gate - 1.0).abs() > 0.0) {
            return Err(Error::argument("gates", gate, "1 for every unit"));
        }
        let mut upstream = upstream.detach();
        for (place, unit) in self.units.iter().enumerate().rev() {
            let (Some(kept), Some(block)) = (self.kept.pop(), self.decoder.blocks().get(unit.block)) else {
                break;
            };
            let x = match kept {
                Kept::Input(x) => x,
                // Computed anew, with variables: what was kept only takes memory.
                Kept::Graph(graph) => graph.x.detach(),
            };
            let x = Var::from_tensor(&x)?;
            let mut vars = Vec::new();
            let block = block.map(None, |param, value| match param {
                BlockParam::Weight(_) => {
                    let var = Var::from_tensor(value)?.into_inner();
                    vars.push(var.clone());
                    Ok(var)
                }
                _ => Ok(value.clone()),
            })?;
            let y = block.forward_part(unit.part, x.as_tensor(), &self.pass, None)?;
            let mut gradients = self.pass.kernels.inner(&y, &upstream)?.backward()?;
            let mut gradient = |tensor: &Tensor| {
                let missing = || Error::NoGradient { tensor: format!("a matrix of block {}", unit.block) };
                gradients.remove(tensor).ok_or_else(missing)
            };
            visit(place, vars.iter().map(&mut gradient).collect::<Result<_>>()?)?;
            upstream = gradient(x.as_tensor())?;
        }
        Ok(())
    }
}

/// A gate on the way back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    /// What it was on the way there.
    pub value: f64,
    /// Whether its gradient is asked for.
    pub wanted: bool,
}

impl Gate {
    /// Whether its unit runs on the way back: a removed unit passes the gradient on as it is, and only its own effect
    /// may have to be known.
    pub(crate) fn runs(self) -> bool {
        self.value != 0.0 || self.wanted
    }
}

impl Block {
    /// What a part of the block makes of `x` under a gate, without a graph: 1 is the original, and with 0 nothing runs.
    pub(crate) fn gated(&self, part: Part, gate: f64, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if gate == 0.0 {
            return Ok(x.clone());
        }
        Ok(gated(x, &self.forward_part(part, x, pass, None)?, gate)?.detach())
    }

    /// From the gradient of the loss with respect to the output of a gated unit of this block, to that with respect to
    /// the gate (0 where it is not wanted) and to that with respect to the input `x`.
    pub(crate) fn gated_back(
        &self,
        unit: Unit,
        gate: Gate,
        x: &Tensor,
        upstream: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(f64, Tensor)> {
        if !gate.runs() {
            return Ok((0.0, upstream.clone()));
        }
        if gate.value == 0.0 {
            let y = self.forward_part(unit.part, x, pass, None)?;
            let effect = value(&pass.kernels.inner(&(y - x)?, upstream)?)?;
            return Ok((effect, upstream.clone()));
        }
        self.unit_graph(unit, x, pass)?.gated_back(gate, upstream, pass)
    }

    /// Computes a unit for an input `x`, `(batch, seq, hidden)`, up to where it can be walked back from.
    pub(crate) fn unit_graph(&self, unit: Unit, x: &Tensor, pass: &Pass<'_>) -> Result<UnitGraph> {
        let x = Var::from_tensor(x)?.into_inner();
        let end = match self.plain_ending(unit.part) {
            Some(ending) => {
                let (state, inside) = self.before(&ending, unit.part, &x, pass)?;
                End::BeforeProduct { ending, state, inside }
            }
            None => End::Output(self.forward_part(unit.part, &x, pass, None)?),
        };
        Ok(UnitGraph { unit, x, end })
    }
}

/// What a unit has computed of an input, with all that it takes to walk back.
#[derive(Debug)]
pub(crate) struct UnitGraph {
    unit: Unit,
    x: Tensor,
    end: End,
}

/// How far a unit was computed. A product that it ends with is not made: its part in what is asked on the way back is
/// known from what goes into it and from the gradient taken back through its matrix.
#[derive(Debug)]
enum End {
    BeforeProduct { ending: Ending, state: Tensor, inside: Tensor },
    Output(Tensor),
}

impl UnitGraph {
    /// What [`Block::gated`] gives, bit for bit, of the gated unit.
    pub(crate) fn gated(&self, gate: f64, pass: &Pass<'_>) -> Result<Tensor> {
        let y = match &self.end {
            End::BeforeProduct { ending, state, inside } => {
                ending.joined(&state.detach(), &inside.detach(), pass)?
            }
            End::Output(y) => y.detach(),
        };
        Ok(gated(&self.x.detach(), &y, gate)?.detach())
    }

    /// What [`Block::gated_back`] gives, of a gate that is not 0.
    pub(crate) fn gated_back(&self, gate: Gate, upstream: &Tensor, pass: &Pass<'_>) -> Result<(f64, Tensor)> {
        let (effect, through) = self.vjp(upstream, pass)?;
        Ok((if gate.wanted { effect } else { 0.0 }, gated(upstream, &through, gate.value)?))
    }

    /// `⟨upstream, u(x) − x⟩` of the unit `u`, and the product of `upstream` with the unit's Jacobian with respect to
    /// its input, `(batch, seq, hidden)`.
    fn vjp(&self, upstream: &Tensor, pass: &Pass<'_>) -> Result<(f64, Tensor)> {
        let (x, kernels) = (&self.x, pass.kernels);
        let (effect, total) = match &self.end {
            End::BeforeProduct { ending, state, inside } => {
                let into = kernels.linear_back(upstream, &ending.weight)?;
                let last = kernels.inner(inside, &into)?;
                let mut effect = value(&last)?;
                if self.unit.part == Part::Whole {
                    let before = (state.detach() - x.detach())?;
                    effect += value(&kernels.inner(&before, upstream)?)?;
                }
                if let Some(bias) = &ending.bias {
                    effect += value(&kernels.inner(&bias.broadcast_as(upstream.shape())?, upstream)?)?;
                }
                (effect, (kernels.inner(state, upstream)? + last)?)
            }
            End::Output(y) => {
                let added = (y.detach() - x.detach())?;
                let effect = value(&kernels.inner(&added, upstream)?)?;
                (effect, kernels.inner(y, upstream)?)
            }
        };
        let gradient = total.backward()?.remove(x);
        let missing = || Error::NoGradient { tensor: format!("the input of unit {}", self.unit) };
        Ok((effect, gradient.ok_or_else(missing)?))
    }
}

impl Decoder {
    /// The summed loss of one window in nats, and its gradient with respect to `hidden`, the states after the last
    /// unit: `(1, seq, hidden)`, a row of zeros for the last token, which predicts nothing.
    ///
    /// # Errors
    /// Targets that do not fit, [`Error::Quantized`], or a failed computation.
    pub fn loss_vjp(&self, hidden: &Tensor, targets: &[u32]) -> Result<(f64, Tensor)> {
        self.check_not_quantized()?;
        let (_, seq, width) = hidden.dims3()?;
        rayon::scope(|_| {
            let rows = Var::from_tensor(&hidden.squeeze(0)?.narrow(0, 0, targets.len())?.contiguous()?)?;
            let losses = self.nll(rows.as_tensor(), targets)?;
            let total = losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
            let mut gradients = losses.sum_all()?.backward()?;
            let gradient = gradients.remove(rows.as_tensor());
            let gradient =
                gradient.ok_or_else(|| Error::NoGradient { tensor: "the last hidden state".into() })?;
            let rest = Tensor::zeros((seq - targets.len(), width), gradient.dtype(), gradient.device())?;
            Ok((total, Tensor::cat(&[gradient, rest], 0)?.unsqueeze(0)?))
        })
    }

    /// Takes `upstream`, the gradient of a block's output, back through the block: the gradients of its input `x`,
    /// where it is wanted, and of all of `wanted` that it uses.
    ///
    /// Where the block ends with a frozen product that joins the residual stream as it is, or by a frozen scale, that
    /// product is never made: its part in the gradient is `upstream` taken back through its matrix. The gradient of a
    /// scale needs what it scales.
    pub(crate) fn block_vjp(
        &self,
        index: usize,
        (x, wants_input): (&Tensor, bool),
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
        pass: &Pass<'_>,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let (block, kernels) = (self.block(index)?, self.kernels);
        let x = if wants_input { Var::from_tensor(x)?.into_inner() } else { x.detach() };
        let last = if block.has(Part::Mlp) { Projection::Down } else { Projection::O };
        let mut bare = block.clone();
        let adapter = std::mem::take(&mut bare.own.adapters[last]);
        let frozen = |ending: &Ending| {
            let bias = ending.bias.as_ref().is_some_and(Tensor::track_op);
            !ending.weight.track_op() && !bias && !adapter.scale.as_ref().is_some_and(Tensor::track_op)
        };
        let total = match bare.plain_ending(Part::Whole).filter(frozen) {
            Some(ending) => {
                let (state, inside) = bare.before(&ending, Part::Whole, &x, pass)?;
                let scaled = match &adapter.scale {
                    Some(scale) => kernels.scale(upstream, scale)?,
                    None => upstream.clone(),
                };
                let into = kernels.linear_back(&scaled, &ending.weight)?;
                let mut total = (kernels.inner(&state, upstream)? + kernels.inner(&inside, &into)?)?;
                if let Some(LowRank { a, b }) = &adapter.low_rank {
                    let residual = kernels.linear(&kernels.linear(&inside, a, None)?, b, None)?;
                    total = (total + kernels.inner(&residual, upstream)?)?;
                }
                total
            }
            None => kernels.inner(&block.forward(&x, pass, None)?, upstream)?,
        };
        let mut gradients = total.backward()?;
        let through = wants_input.then(|| of_input(&mut gradients, &x)).transpose()?;
        Ok((through, of_wanted(&mut gradients, wanted)))
    }

    /// As [`block_vjp`](Self::block_vjp), of the final norm: `(rows, hidden)`.
    pub(crate) fn final_norm_vjp(
        &self,
        x: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let x = Var::from_tensor(x)?;
        let mut gradients = self.kernels.inner(&self.normalised(x.as_tensor())?, upstream)?.backward()?;
        Ok((of_input(&mut gradients, x.as_tensor())?, of_wanted(&mut gradients, wanted)))
    }

    /// As [`block_vjp`](Self::block_vjp), of the embedding of `(batch, seq)` ids.
    pub(crate) fn embedding_vjp(
        &self,
        ids: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let pass = self.pass(0, ids.dims2()?.1)?;
        let mut gradients = self.kernels.inner(&self.embed(ids, &pass)?, upstream)?.backward()?;
        Ok(of_wanted(&mut gradients, wanted))
    }
}

/// `x + gate · (y − x)`.
fn gated(x: &Tensor, y: &Tensor, gate: f64) -> Result<Tensor> {
    if (gate - 1.0).abs() < f64::EPSILON {
        return Ok(y.clone());
    }
    Ok((x + ((y - x)? * gate)?)?)
}

fn value(scalar: &Tensor) -> Result<f64> {
    // On the CPU: not every device knows f64.
    Ok(scalar.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()?)
}

/// The gradient with respect to an input, which has to be there.
fn of_input(gradients: &mut GradStore, x: &Tensor) -> Result<Tensor> {
    let missing = || Error::NoGradient { tensor: "the input of a block or of the final norm".into() };
    gradients.remove(x).ok_or_else(missing)
}

/// The gradients with respect to all of `wanted` that the result depends on.
fn of_wanted(gradients: &mut GradStore, wanted: impl IntoIterator<Item = Tensor>) -> Vec<Option<Tensor>> {
    wanted.into_iter().map(|tensor| gradients.remove(&tensor)).collect()
}
