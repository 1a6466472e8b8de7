//! Next-token loss fused with the output projection.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::simd::{exp, map_in_place, max, sum, tanh, vectorised};
use super::{Kernels, gemm, view};

/// Rows whose logits exist at once.
const CHUNK_ROWS: usize = 128;

impl Kernels {
    /// The negative log-likelihood, in nats, of `targets[i]` under `softcap(hidden[i] · headᵀ)`: `(rows)`.
    ///
    /// `hidden` is `(rows, width)`, `head` is `(vocab, width)`. Logits are made for a chunk of rows at a time and
    /// dropped; where `hidden` is differentiated its gradient is made from the same logits on the way.
    ///
    /// # Errors
    /// Shapes that do not fit, a target outside of the vocabulary, or a failed computation.
    pub fn nll(
        self,
        hidden: &Tensor,
        head: &Tensor,
        targets: &[u32],
        softcap: Option<f64>,
    ) -> Result<Tensor> {
        let ((rows, width), (vocab, head_width)) = (hidden.dims2()?, head.dims2()?);
        if rows != targets.len() || width != head_width {
            bail!("loss of {rows} rows of {width}, {} targets and a head of {head_width}", targets.len());
        }
        if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
            bail!("target {target} is outside of the vocabulary of {vocab}");
        }
        if self.fuses(&[hidden, head]) && !head.track_op() {
            let op = Nll { head: head.clone(), targets: targets.to_vec(), softcap, width };
            let (losses, grad) = op.run(&hidden.contiguous()?, hidden.track_op())?;
            return hidden.apply_op1(Precomputed { losses, grad });
        }
        primitive(hidden, head, targets, softcap)
    }
}

fn primitive(hidden: &Tensor, head: &Tensor, targets: &[u32], softcap: Option<f64>) -> Result<Tensor> {
    let mut losses = Vec::new();
    for (chunk, targets) in targets.chunks(CHUNK_ROWS).enumerate() {
        let rows = hidden.narrow(0, chunk * CHUNK_ROWS, targets.len())?;
        let mut logits = rows.matmul(&head.t()?)?.to_dtype(candle_core::DType::F32)?;
        if let Some(cap) = softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        let targets = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
        let chosen = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?;
        losses.push(chosen.squeeze(1)?.neg()?);
    }
    Tensor::cat(&losses, 0)
}

struct Nll {
    head: Tensor,
    targets: Vec<u32>,
    softcap: Option<f64>,
    width: usize,
}

impl Nll {
    /// The losses, and the gradient of each with respect to its row.
    fn run(&self, hidden: &Tensor, with_gradient: bool) -> Result<(Vec<f32>, Option<Tensor>)> {
        let (hidden_storage, lh) = hidden.storage_and_layout();
        let (head_storage, lw) = self.head.storage_and_layout();
        let (Storage::Cpu(hidden_cpu), Storage::Cpu(head_cpu)) = (&*hidden_storage, &*head_storage) else {
            bail!("operand is not on the cpu");
        };
        let (vocab, stride) = (self.head.dim(0)?, lw.stride());
        let (row_stride, column_stride) = (stride[0], stride[1]);
        let head_view = view((vocab, self.width), (row_stride, column_stride), lw.start_offset());
        let transposed = view((self.width, vocab), (column_stride, row_stride), lw.start_offset());
        let mut losses = Vec::with_capacity(self.targets.len());
        let mut gradient = Vec::new();
        for (chunk, targets) in self.targets.chunks(CHUNK_ROWS).enumerate() {
            let offset = lh.start_offset() + chunk * CHUNK_ROWS * self.width;
            let rows = view((targets.len(), self.width), (self.width, 1), offset);
            let mut logits = gemm(&(hidden_cpu, rows), &(head_cpu, transposed.clone()))?;
            losses.extend(self.reduce(&mut logits, targets, vocab, with_gradient));
            if with_gradient {
                let logits = (&CpuStorage::F32(logits), view((targets.len(), vocab), (vocab, 1), 0));
                gradient.extend(gemm(&logits, &(head_cpu, head_view.clone()))?);
            }
        }
        let gradient = with_gradient.then(|| Tensor::from_vec(gradient, hidden.shape(), hidden.device()));
        Ok((losses, gradient.transpose()?))
    }

    /// The loss of every row of logits; with `gradient` the logits are replaced by the loss's derivative.
    fn reduce(&self, logits: &mut [f32], targets: &[u32], vocab: usize, gradient: bool) -> Vec<f32> {
        let rows = logits.par_chunks_exact_mut(vocab).zip(targets);
        rows.map(|(row, &target)| {
            vectorised(
                #[inline(always)]
                || nll_row(row, target as usize, self.softcap, gradient),
            )
        })
        .collect()
    }
}

#[inline(always)]
fn nll_row(row: &mut [f32], target: usize, softcap: Option<f64>, gradient: bool) -> f32 {
    if let Some(cap) = softcap {
        let cap = cap as f32;
        map_in_place(row, |l| cap * tanh(l / cap));
    }
    let highest = max(row);
    let total = sum(row, |l| exp(l - highest));
    let loss = highest + total.ln() - row[target];
    if gradient {
        let (inverse, chosen) = (1.0 / total, row[target]);
        let slope = |l: f32| softcap.map_or(1.0, |cap| 1.0 - (l / cap as f32) * (l / cap as f32));
        map_in_place(row, |l| exp(l - highest) * inverse * slope(l));
        row[target] -= slope(chosen);
    }
    loss
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
