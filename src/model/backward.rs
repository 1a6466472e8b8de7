//! Walking back through a decoder, unit by unit.
//!
//! Only the input of every unit is kept; each unit is computed again on the way back, so that no graph ever spans
//! more than one. Memory beyond the weights: one input a unit, one unit's activations, one chunk of logits.

use candle_core::{DType, Device, Tensor, Var};

use super::decoder::{Decoder, Pass};
use super::params::BlockParam;
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
    inputs: Vec<Tensor>,
    output: Tensor,
}

impl<'a> Walk<'a> {
    /// Runs `units` over `(batch, seq)` ids, each under its gate, keeping every unit's input.
    ///
    /// # Errors
    /// As many gates as units are needed; [`Error::Quantized`] where there is no way back; or a failed computation.
    pub fn forward(decoder: &'a Decoder, units: &'a [Unit], gates: &[f64], ids: &Tensor) -> Result<Self> {
        if gates.len() != units.len() {
            return Err(Error::argument(
                "gates",
                gates.len(),
                format!("one for each of {} units", units.len()),
            ));
        }
        decoder.check_not_quantized()?;
        let pass = decoder.pass(0, ids.dims2()?.1)?;
        let mut x = decoder.embed(ids, &pass)?.detach();
        let mut inputs = Vec::with_capacity(units.len());
        for (&unit, &gate) in units.iter().zip(gates) {
            let next =
                if gate == 0.0 { x.clone() } else { gated(&x, &decoder.run_unit(unit, &x, &pass)?, gate)? };
            inputs.push(std::mem::replace(&mut x, next.detach()));
        }
        Ok(Self { decoder, pass, units, gates: gates.to_vec(), inputs, output: x })
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
    pub fn gate_gradients(mut self, upstream: &Tensor, wanted: impl Fn(usize) -> bool) -> Result<Vec<f64>> {
        let mut upstream = upstream.detach();
        let mut gradients = vec![0.0; self.units.len()];
        for (place, gradient) in gradients.iter_mut().enumerate().rev() {
            let (Some(x), Some(&unit), Some(&gate)) =
                (self.inputs.pop(), self.units.get(place), self.gates.get(place))
            else {
                break;
            };
            // A removed unit passes the gradient on as it is, and only its own effect has to be known.
            if gate == 0.0 && !wanted(place) {
                continue;
            }
            if gate == 0.0 {
                let y = self.decoder.run_unit(unit, &x, &self.pass)?;
                *gradient = value(&self.pass.kernels.inner(&(y - x)?, &upstream)?)?;
            } else {
                let (effect, through) = self.decoder.unit_vjp(unit, &x, &upstream, &self.pass)?;
                *gradient = if wanted(place) { effect } else { 0.0 };
                upstream = gated(&upstream, &through, gate)?;
            }
        }
        Ok(gradients)
    }

    /// From the gradient of the loss with respect to the output to its gradients with respect to every matrix, given
    /// to `visit` unit by unit, last to first, in the order of [`Block::matrices`](super::Block::matrices). Units are
    /// whole blocks, and every gate is 1.
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
            let (Some(x), Some(block)) = (self.inputs.pop(), self.decoder.blocks().get(unit.block)) else {
                break;
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

impl Decoder {
    /// `⟨upstream, u(x) − x⟩` of a unit `u`, and the product of `upstream` with the unit's Jacobian with respect to
    /// its input, `(batch, seq, hidden)`.
    ///
    /// Where the unit ends with a product, that product is never made: its part in both is known from what goes into
    /// it and from `upstream` taken back through its matrix.
    fn unit_vjp(&self, unit: Unit, x: &Tensor, upstream: &Tensor, pass: &Pass<'_>) -> Result<(f64, Tensor)> {
        let block = self.block(unit.block)?;
        let x = Var::from_tensor(x)?;
        let kernels = pass.kernels;
        let (effect, total) = match block.plain_ending(unit.part) {
            Some(ending) => {
                let (state, inside) = block.before(&ending, unit.part, x.as_tensor(), pass)?;
                let into = kernels.linear_back(upstream, &ending.weight)?;
                let last = kernels.inner(&inside, &into)?;
                let mut effect = value(&last)?;
                if unit.part == Part::Whole {
                    let before = (state.detach() - x.as_tensor().detach())?;
                    effect += value(&kernels.inner(&before, upstream)?)?;
                }
                if let Some(bias) = &ending.bias {
                    effect += value(&kernels.inner(&bias.broadcast_as(upstream.shape())?, upstream)?)?;
                }
                (effect, (kernels.inner(&state, upstream)? + last)?)
            }
            None => {
                let y = block.forward_part(unit.part, x.as_tensor(), pass, None)?;
                let added = (y.detach() - x.as_tensor().detach())?;
                let effect = value(&kernels.inner(&added, upstream)?)?;
                (effect, kernels.inner(&y, upstream)?)
            }
        };
        let gradient = total.backward()?.remove(x.as_tensor());
        Ok((
            effect,
            gradient.ok_or_else(|| Error::NoGradient { tensor: format!("the input of unit {unit}") })?,
        ))
    }

    /// The summed loss of one window in nats, and its gradient with respect to `hidden`, the states after the last
    /// unit: `(1, seq, hidden)`, a row of zeros for the last token, which predicts nothing.
    ///
    /// # Errors
    /// Targets that do not fit, [`Error::Quantized`], or a failed computation.
    pub fn loss_vjp(&self, hidden: &Tensor, targets: &[u32]) -> Result<(f64, Tensor)> {
        self.check_not_quantized()?;
        let (_, seq, width) = hidden.dims3()?;
        let rows = Var::from_tensor(&hidden.squeeze(0)?.narrow(0, 0, targets.len())?.contiguous()?)?;
        let losses = self.nll(rows.as_tensor(), targets)?;
        let total = losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
        let mut gradients = losses.sum_all()?.backward()?;
        let gradient = gradients.remove(rows.as_tensor());
        let gradient =
            gradient.ok_or_else(|| Error::NoGradient { tensor: "the last hidden state".into() })?;
        let rest = Tensor::zeros((seq - targets.len(), width), gradient.dtype(), gradient.device())?;
        Ok((total, Tensor::cat(&[gradient, rest], 0)?.unsqueeze(0)?))
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
