//! The MLP's nonlinearities, plain and gated.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{sigmoid, tanh, vectorised};
use super::{Kernels, TASK_ELEMENTS, by_rows, elements, with_elements};
use crate::model::Activation;

impl Kernels {
    /// `act(gate) ⊙ up`, elementwise on tensors of one shape (SwiGLU, GeGLU).
    ///
    /// # Errors
    /// Shapes that differ, or a failed computation.
    pub fn gated(self, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if let (Some(curve), true) = (Curve::of(activation), self.fuses(&[gate, up])) {
            return gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(curve));
        }
        primitive(activation, gate)? * up
    }

    /// `act(x)`, elementwise.
    ///
    /// # Errors
    /// A failed computation.
    pub fn activation(self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        if let (Some(curve), true) = (Curve::of(activation), self.fuses(&[x])) {
            return x.contiguous()?.apply_op1(Plain(curve));
        }
        primitive(activation, x)
    }
}

fn primitive(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu(),
        Activation::GeluErf => x.gelu_erf(),
        Activation::Relu => x.relu(),
    }
}

/// The nonlinearities that have a fused kernel.
#[derive(Clone, Copy)]
enum Curve {
    Silu,
    GeluTanh,
}

impl Curve {
    fn of(activation: Activation) -> Option<Self> {
        match activation {
            Activation::Silu => Some(Self::Silu),
            Activation::GeluTanh => Some(Self::GeluTanh),
            Activation::GeluErf | Activation::Relu => None,
        }
    }

    /// Value and derivative.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::GeluTanh => {
                const ROOT: f32 = 0.797_884_6; // sqrt(2 / π)
                const CUBIC: f32 = 0.044_715;
                let t = tanh(ROOT * (x + CUBIC * x * x * x));
                let slope = ROOT * (1.0 + 3.0 * CUBIC * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
            }
        }
    }
}

struct Gated(Curve);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(
        &self,
        g: &CpuStorage,
        lg: &Layout,
        u: &CpuStorage,
        lu: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if lg.dims() != lu.dims() {
            bail!("gate is {:?} and up is {:?}, expected one shape", lg.dims(), lu.dims());
        }
        let (gate, up) = (elements(g, lg)?, elements(u, lu)?);
        let curve = self.0;
        let out = by_rows(
            lg.dims().last().copied().unwrap_or(1),
            [gate, up],
            #[inline(always)]
            |_, out, [gate, up]| {
                for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                    *o = curve.at(g).0 * u;
                }
            },
        )?;
        Ok((CpuStorage::F32(out), lg.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let curve = self.0;
        let grad = grad.contiguous()?;
        let (mut d_gate, mut d_up) = (vec![0.0f32; gate.elem_count()], vec![0.0f32; gate.elem_count()]);
        with_elements([gate, up, &grad], |[gate, up, grad]| {
            let inputs = gate.par_chunks(TASK_ELEMENTS).zip(up.par_chunks(TASK_ELEMENTS));
            let outputs = d_gate.par_chunks_mut(TASK_ELEMENTS).zip(d_up.par_chunks_mut(TASK_ELEMENTS));
            let tasks = outputs.zip(inputs).zip(grad.par_chunks(TASK_ELEMENTS));
            tasks.for_each(|(((d_gate, d_up), (gate, up)), grad)| {
                vectorised(
                    #[inline(always)]
                    || {
                        let outputs = d_gate.iter_mut().zip(d_up);
                        for ((((dg, du), &g), &u), &d) in outputs.zip(gate).zip(up).zip(grad) {
                            let (value, slope) = curve.at(g);
                            *dg = d * u * slope;
                            *du = d * value;
                        }
                    },
                );
            });
            Ok(())
        })?;
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}

struct Plain(Curve);

impl CustomOp1 for Plain {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, curve) = (elements(x, lx)?, self.0);
        let out = by_rows(
            lx.dims().last().copied().unwrap_or(1),
            [x],
            #[inline(always)]
            |_, out, [x]| {
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = curve.at(x).0;
                }
            },
        )?;
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (grad, curve) = (grad.contiguous()?, self.0);
        let width = x.dims().last().copied().unwrap_or(1);
        let out = with_elements([x, &grad], |[x, grad]| {
            by_rows(
                width,
                [x, grad],
                #[inline(always)]
                |_, out, [x, grad]| {
                    for ((o, &x), &d) in out.iter_mut().zip(x).zip(grad) {
                        *o = d * curve.at(x).1;
                    }
                },
            )
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}
