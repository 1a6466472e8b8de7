//! Causal softmax attention over grouped heads.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::Kernels;
use super::dots::dots;
use super::gemm::{Threads, gemm, view};
use super::simd::{add_scaled, dot, exp, map_in_place, max, sum, tanh, vectorised};

/// Heads, scale and visibility of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads in a row.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Scores are bounded by `cap · tanh(score / cap)`.
    pub softcap: Option<f64>,
    /// A query sees itself and the `window − 1` keys before it; `None` sees all before it.
    pub window: Option<usize>,
}

impl Kernels {
    /// `softmax(q · kᵀ · scale) · v` for every head, each query seeing the keys up to its own position.
    ///
    /// `q` is `(batch, seq, heads · head_dim)`; `k` and `v` are `(batch, keys, kv_heads · head_dim)`. The last query
    /// stands at the last key, so that with a KV cache `keys > seq`. The result has the shape of `q`. Scores of
    /// at most a few dozen queries of one head exist at a time.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn attention(self, q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
        let extent = Extent::of(q.dims(), k.dims(), v.dims(), &shape)?;
        if self.fuses(&[q, k, v]) {
            return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention(shape));
        }
        primitive(q, k, v, &shape, &extent)
    }
}

/// Candle's own primitives: keys and values are repeated, and all scores exist at once.
fn primitive(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, extent: &Extent) -> Result<Tensor> {
    let Extent { batch, seq, keys } = *extent;
    let group = shape.heads / shape.kv_heads;
    let heads_first = |x: &Tensor, rows, heads| {
        x.reshape((batch, rows, heads, shape.head_dim))?.transpose(1, 2)?.contiguous()
    };
    let repeat = |x: &Tensor| {
        let x = heads_first(x, keys, shape.kv_heads)?.unsqueeze(2)?;
        let repeated = x.broadcast_as((batch, shape.kv_heads, group, keys, shape.head_dim))?;
        repeated.reshape((batch, shape.heads, keys, shape.head_dim))
    };
    let q = heads_first(q, seq, shape.heads)?;
    let mut scores = (q.matmul(&repeat(k)?.t()?)? * shape.scale)?;
    if let Some(cap) = shape.softcap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let mask: Vec<f32> = (0..seq)
        .flat_map(|row| {
            let (first, end) = extent.visible(row, shape.window);
            (0..keys).map(move |key| if (first..end).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (seq, keys), q.device())?.to_dtype(q.dtype())?;
    let probabilities = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    let out = probabilities.matmul(&repeat(v)?)?; // (batch, heads, seq, head_dim)
    out.transpose(1, 2)?.reshape((batch, seq, shape.heads * shape.head_dim))
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Extent {
    batch: usize,
    seq: usize,
    keys: usize,
}

impl Extent {
    fn of(q: &[usize], k: &[usize], v: &[usize], shape: &AttentionShape) -> Result<Self> {
        let (&[batch, seq, q_width], &[k_batch, keys, k_width]) = (q, k) else {
            bail!("attention of queries {q:?} and keys {k:?}, expected three dimensions each");
        };
        let fits = q_width == shape.heads * shape.head_dim
            && k_width == shape.kv_heads * shape.head_dim
            && v == k
            && k_batch == batch
            && keys >= seq
            && shape.kv_heads > 0
            && shape.head_dim > 0
            && shape.heads.is_multiple_of(shape.kv_heads)
            && shape.window != Some(0);
        if !fits {
            bail!("attention of queries {q:?}, keys {k:?} and values {v:?} does not fit {shape:?}");
        }
        Ok(Self { batch, seq, keys })
    }

    /// The keys that the query in `row` sees, as a half-open range.
    #[inline(always)]
    fn visible(&self, row: usize, window: Option<usize>) -> (usize, usize) {
        let end = self.keys - self.seq + row + 1;
        (window.map_or(0, |window| end.saturating_sub(window)), end)
    }
}

/// How many queries of one head are scored together: enough for an efficient product, few enough that little of
/// the causal half that is masked gets computed.
const QUERY_ROWS: usize = 64;

struct Attention(AttentionShape);

/// A stretch of queries of one head, and the keys that any of them sees.
#[derive(Clone, Copy)]
struct Tile {
    batch: usize,
    head: usize,
    first_row: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
}

/// Contiguous operands on the CPU with their offsets.
struct Operands<'a> {
    q: (&'a CpuStorage, usize),
    k: (&'a CpuStorage, usize),
    v: (&'a CpuStorage, usize),
}

impl Attention {
    fn query_width(&self) -> usize {
        self.0.heads * self.0.head_dim
    }

    fn key_width(&self) -> usize {
        self.0.kv_heads * self.0.head_dim
    }

    fn tile(&self, extent: &Extent, batch: usize, head: usize, first_row: usize) -> Tile {
        let rows = QUERY_ROWS.min(extent.seq - first_row);
        let first_key = extent.visible(first_row, self.0.window).0;
        let end = extent.visible(first_row + rows - 1, self.0.window).1;
        Tile { batch, head, first_row, rows, first_key, keys: end - first_key }
    }

    /// The tile's rows of a `(batch, seq, heads · head_dim)` operand: `(rows, head_dim)`.
    fn query_view(&self, extent: &Extent, tile: &Tile, offset: usize) -> Layout {
        let width = self.query_width();
        let start = (tile.batch * extent.seq + tile.first_row) * width + tile.head * self.0.head_dim;
        view((tile.rows, self.0.head_dim), (width, 1), offset + start)
    }

    /// The tile's keys of a `(batch, keys, kv_heads · head_dim)` operand: `(keys, head_dim)`, or transposed.
    fn key_view(&self, extent: &Extent, tile: &Tile, offset: usize, transposed: bool) -> Layout {
        let (width, dim) = (self.key_width(), self.0.head_dim);
        let kv_head = tile.head / (self.0.heads / self.0.kv_heads);
        let start = offset + (tile.batch * extent.keys + tile.first_key) * width + kv_head * dim;
        if transposed {
            view((dim, tile.keys), (1, width), start)
        } else {
            view((tile.keys, dim), (width, 1), start)
        }
    }

    /// Softmax over what each row sees, in place; what it does not see becomes 0.
    #[inline(always)]
    fn softmax(&self, extent: &Extent, tile: &Tile, scores: &mut [f32]) {
        let scale = self.0.scale as f32;
        for (row, scores) in scores.chunks_exact_mut(tile.keys).enumerate() {
            let (first, end) = extent.visible(tile.first_row + row, self.0.window);
            let (before, rest) = scores.split_at_mut(first - tile.first_key);
            let (seen, after) = rest.split_at_mut(end - first);
            before.fill(0.0);
            after.fill(0.0);
            softmax_row(seen, scale, self.0.softcap);
        }
    }

    fn probabilities(&self, extent: &Extent, tile: &Tile, operands: &Operands<'_>) -> Result<Vec<f32>> {
        let q = (operands.q.0, self.query_view(extent, tile, operands.q.1));
        let k = (operands.k.0, self.key_view(extent, tile, operands.k.1, true));
        let mut scores = gemm(&q, &k, Threads::One)?; // (rows, keys)
        vectorised(
            #[inline(always)]
            || self.softmax(extent, tile, &mut scores),
        );
        Ok(scores)
    }

    fn tiles(&self, extent: &Extent) -> Vec<Tile> {
        let mut tiles = Vec::new();
        for batch in 0..extent.batch {
            // The longest rows first: the work is spread more evenly.
            for first_row in (0..extent.seq).step_by(QUERY_ROWS).rev() {
                tiles.extend((0..self.0.heads).map(|head| self.tile(extent, batch, head, first_row)));
            }
        }
        tiles
    }

    fn forward(&self, extent: &Extent, operands: &Operands<'_>) -> Result<Vec<f32>> {
        let (width, dim) = (self.query_width(), self.0.head_dim);
        let tiles = self.tiles(extent);
        let parts = (tiles.par_iter().with_max_len(1))
            .map(|tile| {
                let probabilities = CpuStorage::F32(self.probabilities(extent, tile, operands)?);
                let weights = view((tile.rows, tile.keys), (tile.keys, 1), 0);
                gemm(
                    &(&probabilities, weights),
                    &(operands.v.0, self.key_view(extent, tile, operands.v.1, false)),
                    Threads::One,
                )
            })
            .collect::<Result<Vec<_>>>()?;
        let mut out = vec![0.0f32; extent.batch * extent.seq * width];
        for (tile, part) in tiles.iter().zip(&parts) {
            let start = (tile.batch * extent.seq + tile.first_row) * width + tile.head * dim;
            for (row, part) in part.chunks_exact(dim).enumerate() {
                out[start + row * width..][..dim].copy_from_slice(part);
            }
        }
        Ok(out)
    }

    /// One query against the cache: too little work for a matrix product.
    fn forward_one(&self, extent: &Extent, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (width, key_width, dim) = (self.query_width(), self.key_width(), self.0.head_dim);
        let group = self.0.heads / self.0.kv_heads;
        let (first, end) = extent.visible(0, self.0.window);
        let mut out = vec![0.0f32; extent.batch * width];
        let head_task = |(index, (out, q)): (usize, (&mut [f32], &[f32]))| {
            let (batch, head) = (index / self.0.heads, index % self.0.heads);
            let start = batch * extent.keys * key_width + head / group * dim;
            let at = |key: usize| start + key * key_width;
            let mut scores = vec![0.0f32; end - first];
            dots(q, (&k[at(first)..], key_width), &mut scores);
            vectorised(
                #[inline(always)]
                || {
                    softmax_row(&mut scores, self.0.scale as f32, self.0.softcap);
                    for (key, &weight) in (first..end).zip(&scores) {
                        add_scaled(out, weight, &v[at(key)..][..dim]);
                    }
                },
            );
        };
        out.par_chunks_exact_mut(dim)
            .zip(q.par_chunks_exact(dim))
            .with_min_len((super::TASK_ELEMENTS / (dim * (end - first))).max(1))
            .enumerate()
            .for_each(head_task);
        out
    }
}

/// Softmax of `softcap(scale · score)` in place.
#[inline(always)]
fn softmax_row(scores: &mut [f32], scale: f32, softcap: Option<f64>) {
    match softcap {
        None => map_in_place(scores, |s| s * scale),
        Some(cap) => {
            let cap = cap as f32;
            map_in_place(scores, |s| cap * tanh(s * scale / cap));
        }
    }
    let highest = max(scores);
    map_in_place(scores, |s| exp(s - highest));
    let inverse = 1.0 / sum(scores, |s| s);
    map_in_place(scores, |s| s * inverse);
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let extent = Extent::of(lq.dims(), lk.dims(), lv.dims(), &self.0)?;
        let out = if extent.seq == 1 {
            let [q, k, v] = [super::elements(q, lq)?, super::elements(k, lk)?, super::elements(v, lv)?];
            self.forward_one(&extent, q, k, v)
        } else {
            let operands =
                Operands { q: (q, lq.start_offset()), k: (k, lk.start_offset()), v: (v, lv.start_offset()) };
            self.forward(&extent, &operands)?
        };
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let extent = Extent::of(q.dims(), k.dims(), v.dims(), &self.0)?;
        let guards = [q, k, v, out, &grad].map(Tensor::storage_and_layout);
        let mut operands = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            let Storage::Cpu(storage) = &**storage else { bail!("operand is not on the cpu") };
            operands.push((storage, layout.start_offset()));
        }
        let &[q_, k_, v_, out_, grad_] = operands.as_slice() else { bail!("expected five operands") };
        let backward =
            Backward { op: self, extent, operands: Operands { q: q_, k: k_, v: v_ }, out: out_, grad: grad_ };
        let (dq, dk, dv) = backward.run()?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// The vector-Jacobian product; probabilities are computed again, tile by tile.
struct Backward<'a> {
    op: &'a Attention,
    extent: Extent,
    operands: Operands<'a>,
    out: (&'a CpuStorage, usize),
    grad: (&'a CpuStorage, usize),
}

/// The gradients of one head: of its queries, and its share of those of its keys and values, contiguous rows each.
struct HeadGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Backward<'_> {
    fn run(&self) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let (shape, extent) = (&self.op.0, &self.extent);
        let heads = (0..extent.batch * shape.heads)
            .into_par_iter()
            .map(|index| self.head(index / shape.heads, index % shape.heads))
            .collect::<Result<Vec<_>>>()?;
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let (q_width, k_width) = (self.op.query_width(), self.op.key_width());
        let mut dq = vec![0.0f32; extent.batch * extent.seq * q_width];
        let mut dk = vec![0.0f32; extent.batch * extent.keys * k_width];
        let mut dv = dk.clone();
        for (index, part) in heads.iter().enumerate() {
            let (batch, head) = (index / shape.heads, index % shape.heads);
            scatter(&mut dq[batch * extent.seq * q_width..], &part.q, head * dim, q_width, dim);
            scatter(&mut dk[batch * extent.keys * k_width..], &part.k, head / group * dim, k_width, dim);
            scatter(&mut dv[batch * extent.keys * k_width..], &part.v, head / group * dim, k_width, dim);
        }
        Ok((dq, dk, dv))
    }

    fn head(&self, batch: usize, head: usize) -> Result<HeadGradients> {
        let dim = self.op.0.head_dim;
        let mut sums = HeadGradients {
            q: vec![0.0; self.extent.seq * dim],
            k: vec![0.0; self.extent.keys * dim],
            v: vec![0.0; self.extent.keys * dim],
        };
        for first_row in (0..self.extent.seq).step_by(QUERY_ROWS) {
            self.tile(&self.op.tile(&self.extent, batch, head, first_row), &mut sums)?;
        }
        Ok(sums)
    }

    fn tile(&self, tile: &Tile, sums: &mut HeadGradients) -> Result<()> {
        let (op, extent) = (self.op, &self.extent);
        let (dim, width) = (op.0.head_dim, op.query_width());
        let probabilities = op.probabilities(extent, tile, &self.operands)?;
        let grad_view = op.query_view(extent, tile, self.grad.1);
        let values = (self.operands.v.0, op.key_view(extent, tile, self.operands.v.1, true));
        let mut d_scores = gemm(&(self.grad.0, grad_view.clone()), &values, Threads::One)?; // (rows, keys)
        let slopes = self.softcap_slopes(tile)?;
        let (out, grad) = (self.out.0.as_slice::<f32>()?, self.grad.0.as_slice::<f32>()?);
        let row_start = (tile.batch * extent.seq + tile.first_row) * width + tile.head * dim;
        vectorised(
            #[inline(always)]
            || {
                let scale = op.0.scale as f32;
                let rows = d_scores.chunks_exact_mut(tile.keys).zip(probabilities.chunks_exact(tile.keys));
                for (row, (d_scores, probabilities)) in rows.enumerate() {
                    let at = row_start + row * width;
                    let mean = dot(&out[self.out.1 + at..][..dim], &grad[self.grad.1 + at..][..dim]);
                    for (d, &p) in d_scores.iter_mut().zip(probabilities) {
                        *d = p * (*d - mean) * scale;
                    }
                }
                for (d, &slope) in d_scores.iter_mut().zip(&slopes) {
                    *d *= slope;
                }
            },
        );
        let by_row = view((tile.rows, tile.keys), (tile.keys, 1), 0);
        let by_key = view((tile.keys, tile.rows), (1, tile.keys), 0);
        let (probabilities, d_scores) = (CpuStorage::F32(probabilities), CpuStorage::F32(d_scores));
        let keys = (self.operands.k.0, op.key_view(extent, tile, self.operands.k.1, false));
        let queries = (self.operands.q.0, op.query_view(extent, tile, self.operands.q.1));
        let dq = gemm(&(&d_scores, by_row), &keys, Threads::One)?;
        let dk = gemm(&(&d_scores, by_key.clone()), &queries, Threads::One)?;
        let dv = gemm(&(&probabilities, by_key), &(self.grad.0, grad_view), Threads::One)?;
        sums.q[tile.first_row * dim..][..dq.len()].copy_from_slice(&dq);
        add_scaled(&mut sums.k[tile.first_key * dim..][..dk.len()], 1.0, &dk);
        add_scaled(&mut sums.v[tile.first_key * dim..][..dv.len()], 1.0, &dv);
        Ok(())
    }

    /// The derivative of the soft cap at every score, or nothing where there is no cap.
    fn softcap_slopes(&self, tile: &Tile) -> Result<Vec<f32>> {
        let Some(cap) = self.op.0.softcap else { return Ok(Vec::new()) };
        let q = (self.operands.q.0, self.op.query_view(&self.extent, tile, self.operands.q.1));
        let k = (self.operands.k.0, self.op.key_view(&self.extent, tile, self.operands.k.1, true));
        let mut scores = gemm(&q, &k, Threads::One)?;
        let factor = (self.op.0.scale / cap) as f32;
        vectorised(
            #[inline(always)]
            || {
                map_in_place(&mut scores, |s| {
                    let t = tanh(s * factor);
                    1.0 - t * t
                });
            },
        );
        Ok(scores)
    }
}

/// Adds rows of `dim` into rows of `width`, from column `column` on.
fn scatter(into: &mut [f32], rows: &[f32], column: usize, width: usize, dim: usize) {
    for (into, row) in into.chunks_exact_mut(width).zip(rows.chunks_exact(dim)) {
        add_scaled(&mut into[column..][..dim], 1.0, row);
    }
}
