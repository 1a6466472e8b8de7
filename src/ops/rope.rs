//! Rotary position embedding, in the half-rotation layout of transformers.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

use super::{Kernels, by_rows, elements};

impl Kernels {
    /// Rotates the leading `2 · half` dimensions of every head by its position's angles.
    ///
    /// `x` is `(batch, seq, heads · head_dim)`; `cos` and `sin` are `(seq, half)`. Dimension `i` is paired with
    /// `i + half`; dimensions from `2 · half` on pass through (partial rotary).
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn rope(self, x: &Tensor, cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Tensor> {
        if self.fuses(&[x, cos, sin]) {
            let op = Rope { head_dim, direction: 1.0 };
            return x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, op);
        }
        let (batch, seq, width) = x.dims3()?;
        let half = cos.dim(1)?;
        if head_dim == 0 {
            bail!("rope of heads of width 0");
        }
        let cos = cos.to_dtype(x.dtype())?.reshape((1, seq, 1, half))?;
        let sin = sin.to_dtype(x.dtype())?.reshape((1, seq, 1, half))?;
        let heads = x.reshape((batch, seq, width / head_dim, head_dim))?;
        let first = heads.narrow(D::Minus1, 0, half)?;
        let second = heads.narrow(D::Minus1, half, half)?;
        let mut parts = vec![
            (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
            (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
        ];
        if head_dim > 2 * half {
            parts.push(heads.narrow(D::Minus1, 2 * half, head_dim - 2 * half)?);
        }
        Tensor::cat(&parts, D::Minus1)?.reshape((batch, seq, width))
    }
}

struct Rope {
    head_dim: usize,
    /// 1 rotates forward, −1 back: the gradient of a rotation is the opposite rotation.
    direction: f32,
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        cos: &CpuStorage,
        lc: &Layout,
        sin: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, cos, sin) = (elements(x, lx)?, elements(cos, lc)?, elements(sin, ls)?);
        let (_, seq, width) = lx.shape().dims3()?;
        let (positions, half) = lc.shape().dims2()?;
        let head_dim = self.head_dim;
        let whole_heads = head_dim > 0 && width.is_multiple_of(head_dim);
        if positions != seq || ls.dims() != lc.dims() || 2 * half > head_dim || !whole_heads {
            bail!(
                "rope of {seq} positions and heads of {head_dim} in {width} with tables ({positions}, {half})"
            );
        }
        let out = by_rows(
            width,
            [x],
            #[inline(always)]
            |row, out, [x]| {
                let at = row % seq * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                    rotate(out, x, cos, sin, self.direction);
                }
            },
        )?;
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let back = Rope { head_dim: self.head_dim, direction: -self.direction };
        Ok((Some(grad.contiguous()?.apply_op3_no_bwd(cos, sin, &back)?), None, None))
    }
}

/// One head: `(first, second)` becomes `(first·cos − second·sin, second·cos + first·sin)`, the rest is copied.
#[inline(always)]
fn rotate(out: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32], direction: f32) {
    let half = cos.len();
    let (rotated, kept) = out.split_at_mut(2 * half);
    kept.copy_from_slice(&x[2 * half..]);
    let (out_first, out_second) = rotated.split_at_mut(half);
    let (first, second) = x[..2 * half].split_at(half);
    let outputs = out_first.iter_mut().zip(out_second);
    for (((o, &a), &b), (&c, &s)) in outputs.zip(first).zip(second).zip(cos.iter().zip(sin)) {
        let s = s * direction;
        *o.0 = a * c - b * s;
        *o.1 = b * c + a * s;
    }
}
