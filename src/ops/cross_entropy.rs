//! Next-token loss fused with the output projection.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Storage, Tensor, Var, bail};
use rayon::prelude::*;

use super::frozen::Frozen;
use super::simd::{exp, map_in_place, max, sum, tanh, vectorised};
use super::{Kernels, Matrix};

/// Rows whose logits exist at once where the gradient is wanted.
pub(super) const CHUNK_ROWS: usize = 128;
/// Rows, and entries of the vocabulary, whose logits exist at once where only the loss is.
const LOSS_ROWS: usize = 512;
const STRETCH: usize = 1536;

impl Kernels {
    /// The negative log-likelihood, in nats, of `targets[i]` under `softcap(hidden[i] · headᵀ)`: `(rows)`.
    ///
    /// `hidden` is `(rows, width)`, `head` is `(vocab, width)`. Logits are made for a part of rows and vocabulary at
    /// a time and dropped; where `hidden` is differentiated its gradient is made from the same logits on the way.
    ///
    /// # Errors
    /// Shapes that do not fit, a target outside of the vocabulary, or a failed computation.
    pub fn nll(
        self,
        hidden: &Tensor,
        head: impl Into<Matrix>,
        targets: &[u32],
        softcap: Option<f64>,
    ) -> Result<Tensor> {
        let head = head.into();
        let ((rows, width), (vocab, head_width)) = (hidden.dims2()?, head.dims2()?);
        if rows != targets.len() || width != head_width {
            bail!("loss of {rows} rows of {width}, {} targets and a head of {head_width}", targets.len());
        }
        if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
            bail!("target {target} is outside of the vocabulary of {vocab}");
        }
        if let (Some(head), true) = (self.frozen(&head), self.fuses(&[hidden])) {
            let op = Nll { head, targets: targets.to_vec(), softcap, width };
            let rows = hidden.contiguous()?;
            let (losses, grad) = if hidden.track_op() {
                let (losses, grad) = op.with_gradient(&rows)?;
                (losses, Some(grad))
            } else {
                (op.losses(&rows)?, None)
            };
            return hidden.apply_op1(Precomputed { losses, grad });
        }
        primitive(hidden, &head.widened(hidden.dtype())?.t()?, targets, softcap)
    }
}

/// `head` is `(width, vocab)`. A graph over all rows would keep all logits: it is made only where the head is trained.
fn primitive(hidden: &Tensor, head: &Tensor, targets: &[u32], softcap: Option<f64>) -> Result<Tensor> {
    let alone = |rows: &Tensor, targets: &[u32]| -> Result<Tensor> {
        let mut logits = rows.matmul(head)?.to_dtype(DType::F32)?;
        if let Some(cap) = softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        let targets = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
        candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?.squeeze(1)?.neg()
    };
    let mut losses = Vec::new();
    for (chunk, targets) in targets.chunks(CHUNK_ROWS).enumerate() {
        let rows = hidden.narrow(0, chunk * CHUNK_ROWS, targets.len())?;
        losses.push(if hidden.track_op() && !head.track_op() {
            differentiated(&rows, |rows| alone(rows, targets))?
        } else {
            alone(&rows, targets)?
        });
    }
    Tensor::cat(&losses, 0)
}

/// The losses of rows, one for each, differentiated at once: bound to the graph of `rows` by their gradient alone.
fn differentiated(rows: &Tensor, losses: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let leaf = Var::from_tensor(&rows.detach())?;
    let losses = losses(leaf.as_tensor())?;
    let gradients = losses.sum_all()?.backward()?;
    let Some(gradient) = gradients.get(&leaf) else { bail!("the losses have no gradient") };
    let nothing = (rows - rows.detach())?;
    losses.detach() + (nothing * gradient)?.to_dtype(DType::F32)?.sum(1)?
}

struct Nll {
    head: Frozen,
    targets: Vec<u32>,
    softcap: Option<f64>,
    width: usize,
}

impl Nll {
    /// The losses alone. Logits are made for a stretch of the vocabulary at a time, small enough to stay in cache,
    /// and summed up as they come; for all of it where the head does not divide, of fewer rows.
    fn losses(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let (storage, layout) = hidden.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("operand is not on the cpu") };
        let vocab = self.head.dims()?.0;
        let (chunk_rows, stretch) =
            if self.head.divides() { (LOSS_ROWS, STRETCH) } else { (CHUNK_ROWS, vocab.max(1)) };
        let mut losses = Vec::with_capacity(self.targets.len());
        for (chunk, targets) in self.targets.chunks(chunk_rows).enumerate() {
            let offset = layout.start_offset() + chunk * chunk_rows * self.width;
            let mut sums = vec![LogSumExp::EMPTY; targets.len()];
            let mut chosen = vec![0.0f32; targets.len()];
            for first in (0..vocab).step_by(stretch) {
                let outputs = self.head.outputs(first, stretch.min(vocab - first))?;
                let mut logits = outputs.forward(storage, offset, targets.len())?;
                let width = logits.len() / targets.len();
                let rows = logits.par_chunks_exact_mut(width).zip(&mut sums).zip(&mut chosen).zip(targets);
                rows.for_each(|(((row, sum), chosen), &target)| {
                    vectorised(
                        #[inline(always)]
                        || cap(row, self.softcap),
                    );
                    if let Some(&logit) = (target as usize).checked_sub(first).and_then(|at| row.get(at)) {
                        *chosen = logit;
                    }
                    vectorised(
                        #[inline(always)]
                        || sum.add(row),
                    );
                });
            }
            losses.extend(sums.iter().zip(chosen).map(|(sum, chosen)| sum.value() - chosen));
        }
        Ok(losses)
    }

    /// The losses, and the gradient of each with respect to its row.
    fn with_gradient(&self, hidden: &Tensor) -> Result<(Vec<f32>, Tensor)> {
        let (storage, layout) = hidden.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("operand is not on the cpu") };
        let vocab = self.head.dims()?.0;
        let mut losses = Vec::with_capacity(self.targets.len());
        let mut gradient = Vec::with_capacity(hidden.elem_count());
        for (chunk, targets) in self.targets.chunks(CHUNK_ROWS).enumerate() {
            let offset = layout.start_offset() + chunk * CHUNK_ROWS * self.width;
            let mut logits = self.head.forward(storage, offset, targets.len())?;
            losses.par_extend(logits.par_chunks_exact_mut(vocab).zip(targets).map(|(row, &target)| {
                vectorised(
                    #[inline(always)]
                    || differentiate(row, target as usize, self.softcap),
                )
            }));
            gradient.extend(self.head.backward(&CpuStorage::F32(logits), 0, targets.len())?);
        }
        Ok((losses, Tensor::from_vec(gradient, hidden.shape(), hidden.device())?))
    }
}

/// `log Σ exp(x)` of numbers that come in stretches.
#[derive(Clone, Copy)]
pub(super) struct LogSumExp {
    highest: f32,
    total: f32,
}

impl LogSumExp {
    pub(super) const EMPTY: Self = Self { highest: f32::NEG_INFINITY, total: 0.0 };

    #[inline(always)]
    pub(super) fn add(&mut self, numbers: &[f32]) {
        let highest = max(numbers);
        if highest > self.highest {
            self.total *= exp(self.highest - highest);
            self.highest = highest;
        }
        self.total += sum(numbers, |x| exp(x - self.highest));
    }

    pub(super) fn value(self) -> f32 {
        self.highest + self.total.ln()
    }
}

#[inline(always)]
pub(super) fn cap(row: &mut [f32], softcap: Option<f64>) {
    if let Some(cap) = softcap {
        let cap = cap as f32;
        map_in_place(row, |l| cap * tanh(l / cap));
    }
}

/// The loss of a row of logits, which are replaced by its derivative.
#[inline(always)]
fn differentiate(row: &mut [f32], target: usize, softcap: Option<f64>) -> f32 {
    cap(row, softcap);
    let slope = |l: f32| softcap.map_or(1.0, |cap| 1.0 - (l / cap as f32) * (l / cap as f32));
    let mut sum = LogSumExp::EMPTY;
    sum.add(row);
    let (inverse, chosen) = (1.0 / sum.total, row[target]);
    map_in_place(row, |l| exp(l - sum.highest) * inverse * slope(l));
    row[target] -= slope(chosen);
    sum.value() - chosen
}

/// Binds losses that are already known, and their gradient, to the graph of `hidden`.
struct Precomputed {
    losses: Vec<f32>,
    grad: Option<Tensor>,
}

impl CustomOp1 for Precomputed {
    fn name(&self) -> &'static str {
        "nll"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.losses.clone()), self.losses.len().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(rows) = &self.grad else { bail!("the loss was computed without its gradient") };
        Ok(Some(rows.broadcast_mul(&grad.unsqueeze(1)?)?))
    }
}
