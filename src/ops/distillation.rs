//! The losses at the head, of a text and of a teacher, with their gradients, in one pass over the logits.

use candle_core::{CpuStorage, D, DType, Result, Storage, Tensor, Var, bail};
use rayon::prelude::*;

use super::Kernels;
use super::cross_entropy::{CHUNK_ROWS, LogSumExp, cap};
use super::simd::{exp, map_in_place, sum2, vectorised};

/// An output projection: `softcap(hidden · weightᵀ)`.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// `(vocab, width)`.
    pub weight: &'a Tensor,
    /// Where logits are bounded, the bound.
    pub softcap: Option<f64>,
}

/// What a teacher expects after each row.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Soft<'a> {
    /// Everything: its normalised states `(rows, width)`, and its head, over the same vocabulary.
    States(&'a Tensor, Head<'a>),
    /// Its likeliest tokens. The rest of the vocabulary counts as one more outcome, so that the divergence is a lower
    /// bound of the true one and equal to it where no token is left over.
    Top(&'a TopTokens),
}

/// The likeliest tokens of a teacher at one temperature, the same number for every row.
#[derive(Debug, Clone, PartialEq)]
pub struct TopTokens {
    /// Token ids, `count` a row.
    pub ids: Vec<u32>,
    /// Their probabilities.
    pub probabilities: Vec<f32>,
    /// What a row's probabilities lack to 1.
    pub rest: Vec<f32>,
    /// Tokens of each row.
    pub count: usize,
}

/// How much the terms of the loss at the head weigh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadWeights {
    /// Of the cross-entropy.
    pub cross_entropy: f64,
    /// Of τ² times the divergence from the teacher.
    pub divergence: f64,
    /// τ: the logits of both are divided by it.
    pub temperature: f64,
}

impl HeadWeights {
    /// Both weights times `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        let Self { cross_entropy, divergence, temperature } = self;
        Self { cross_entropy: cross_entropy * factor, divergence: divergence * factor, temperature }
    }
}

/// Losses summed over rows, in nats, and the gradient of their weighted sum.
#[derive(Debug)]
pub struct HeadLoss {
    /// The negative log-likelihood of the targets.
    pub cross_entropy: f64,
    /// τ² · KL(teacher ‖ student) at temperature τ; 0 without a teacher.
    pub divergence: f64,
    /// The gradient with respect to the rows, `(rows, width)`.
    pub hidden: Tensor,
    /// The gradient with respect to the head's weight, `(vocab, width)`, where it was wanted.
    pub weight: Option<Tensor>,
}

impl Kernels {
    /// Cross-entropy of `targets`, and the divergence from a teacher (Hinton et al., 2015, arXiv 1503.02531), for
    /// normalised states `hidden`, `(rows, width)`, with the gradient of
    /// `cross_entropy · Σ nll + divergence · τ² · Σ KL(teacher ‖ student)`.
    ///
    /// The logits of teacher and student exist for a part of the rows at a time, and are made once for both terms.
    ///
    /// # Errors
    /// Shapes that do not fit, a target outside of the vocabulary, or a failed computation.
    pub fn head_loss(
        self,
        hidden: &Tensor,
        head: Head<'_>,
        targets: &[u32],
        soft: Option<Soft<'_>>,
        weights: HeadWeights,
        wants_weight: bool,
    ) -> Result<HeadLoss> {
        check(hidden, head, targets, soft, weights)?;
        let (hidden, weight) = (hidden.detach().contiguous()?, head.weight.detach());
        let head = Head { weight: &weight, ..head };
        let (mut cross_entropy, mut divergence) = (0.0, 0.0);
        let (mut rows, mut of_weight) = (Vec::new(), None::<Tensor>);
        for (chunk, targets) in targets.chunks(CHUNK_ROWS).enumerate() {
            let first = chunk * CHUNK_ROWS;
            let part = Chunk {
                first,
                hidden: hidden.narrow(0, first, targets.len())?,
                head,
                targets,
                soft,
                weights,
            };
            let found = if self.frozen(&weight).is_some() && self.fuses(&[&part.hidden]) {
                part.fused(self, wants_weight)?
            } else {
                part.primitive(self, wants_weight)?
            };
            cross_entropy += found.cross_entropy;
            divergence += found.divergence;
            rows.push(found.hidden);
            of_weight = match (of_weight, found.weight) {
                (Some(sum), Some(more)) => Some(self.add(&sum, &more)?),
                (sum, more) => sum.or(more),
            };
        }
        Ok(HeadLoss { cross_entropy, divergence, hidden: Tensor::cat(&rows, 0)?, weight: of_weight })
    }

    /// The `count` likeliest tokens of each row under `head` at a temperature, likeliest first, of tokens that are
    /// equally likely the first ones. `hidden` is `(rows, width)`, normalised states.
    ///
    /// # Errors
    /// Shapes that do not fit, a count beyond the vocabulary, or a failed computation.
    pub fn top_tokens(
        self,
        hidden: &Tensor,
        head: Head<'_>,
        count: usize,
        temperature: f64,
    ) -> Result<TopTokens> {
        let ((rows, width), (vocab, head_width)) = (hidden.dims2()?, head.weight.dims2()?);
        if width != head_width {
            bail!("rows of {width} and a head of {head_width}");
        }
        check_temperature(temperature)?;
        if count == 0 || count > vocab {
            bail!("{count} likeliest tokens of a vocabulary of {vocab}");
        }
        let mut top = TopTokens { ids: Vec::new(), probabilities: Vec::new(), rest: Vec::new(), count };
        for first in (0..rows).step_by(CHUNK_ROWS) {
            let chunk = hidden.narrow(0, first, CHUNK_ROWS.min(rows - first))?;
            let logits = self.capped(&chunk, head)?;
            let found: Vec<_> =
                logits.par_chunks_exact(vocab).map(|row| likeliest(row, count, temperature as f32)).collect();
            for (ids, probabilities, rest) in found {
                top.ids.extend(ids);
                top.probabilities.extend(probabilities);
                top.rest.push(rest);
            }
        }
        Ok(top)
    }

    /// The logits of all rows, one after the other, capped where the head caps them.
    fn capped(self, hidden: &Tensor, head: Head<'_>) -> Result<Vec<f32>> {
        let mut logits = self.logits(hidden, head.weight)?;
        if head.softcap.is_some() {
            logits.par_chunks_exact_mut(head.weight.dim(0)?).for_each(|row| {
                vectorised(
                    #[inline(always)]
                    || cap(row, head.softcap),
                );
            });
        }
        Ok(logits)
    }

    fn logits(self, hidden: &Tensor, weight: &Tensor) -> Result<Vec<f32>> {
        let (hidden, weight) = (hidden.detach().contiguous()?, weight.detach());
        let Some(frozen) = self.frozen(&weight).filter(|_| self.fuses(&[&hidden])) else {
            return self.linear(&hidden, &weight, None)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        };
        let (storage, layout) = hidden.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("operand is not on the cpu") };
        frozen.forward(storage, layout.start_offset(), hidden.dim(0)?)
    }
}

fn check_temperature(temperature: f64) -> Result<()> {
    if !(temperature.is_finite() && temperature > 0.0) {
        bail!("temperature is {temperature}, expected a positive number");
    }
    Ok(())
}

fn check(
    hidden: &Tensor,
    head: Head<'_>,
    targets: &[u32],
    soft: Option<Soft<'_>>,
    weights: HeadWeights,
) -> Result<()> {
    let ((rows, width), (vocab, head_width)) = (hidden.dims2()?, head.weight.dims2()?);
    if rows != targets.len() || rows == 0 || width != head_width {
        bail!("loss of {rows} rows of {width}, {} targets and a head of {head_width}", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
        bail!("target {target} is outside of the vocabulary of {vocab}");
    }
    check_temperature(weights.temperature)?;
    match soft {
        Some(Soft::States(states, teacher)) => {
            let found = (states.dims2()?, teacher.weight.dims2()?);
            if found.0 != (rows, found.1.1) || found.1.0 != vocab {
                bail!(
                    "teacher with states and head of {found:?}, expected {rows} rows and a vocabulary of {vocab}"
                );
            }
        }
        Some(Soft::Top(top)) => {
            let lengths = (top.ids.len(), top.probabilities.len(), top.rest.len());
            if lengths != (rows * top.count, rows * top.count, rows) || top.count == 0 {
                bail!(
                    "teacher with {lengths:?} ids, probabilities and rests, expected {} for {rows} rows",
                    top.count
                );
            }
            if let Some(id) = top.ids.iter().find(|&&id| id as usize >= vocab) {
                bail!("teacher's token {id} is outside of the vocabulary of {vocab}");
            }
        }
        None => {}
    }
    Ok(())
}

/// Some of the rows.
struct Chunk<'a> {
    first: usize,
    hidden: Tensor,
    head: Head<'a>,
    targets: &'a [u32],
    soft: Option<Soft<'a>>,
    weights: HeadWeights,
}

impl Chunk<'_> {
    fn fused(&self, kernels: Kernels, wants_weight: bool) -> Result<HeadLoss> {
        let Some(head) = kernels.frozen(self.head.weight) else { bail!("head is not of a fused type") };
        let (rows, vocab) = (self.targets.len(), head.dims()?.0);
        let mut logits = kernels.logits(&self.hidden, self.head.weight)?;
        let terms = Terms { softcap: self.head.softcap, weights: self.weights };
        let row_losses: Vec<(f32, f32)> = match self.soft {
            Some(Soft::States(states, teacher)) => {
                let teacher = kernels.capped(&states.narrow(0, self.first, rows)?, teacher)?;
                let pairs = logits.par_chunks_exact_mut(vocab).zip(teacher.par_chunks_exact(vocab));
                pairs
                    .zip(self.targets)
                    .map(|((row, teacher), &target)| terms.full(row, teacher, target))
                    .collect()
            }
            Some(Soft::Top(top)) => {
                let (from, count) = (self.first, top.count);
                let ids = top.ids[from * count..].par_chunks_exact(count);
                let top =
                    ids.zip(top.probabilities[from * count..].par_chunks_exact(count)).zip(&top.rest[from..]);
                let rows = logits.par_chunks_exact_mut(vocab).zip(self.targets).zip(top);
                rows.map(|((row, &target), ((ids, p), &rest))| {
                    vectorised(
                        #[inline(always)]
                        || terms.top(row, target, ids, p, rest),
                    )
                })
                .collect()
            }
            None => {
                let rows = logits.par_chunks_exact_mut(vocab).zip(self.targets);
                rows.map(|(row, &target)| (terms.hard(row, target), 0.0)).collect()
            }
        };
        let sum = |of: fn(&(f32, f32)) -> f32| row_losses.iter().map(|row| f64::from(of(row))).sum();
        let weight = wants_weight
            .then(|| {
                let grad = Tensor::from_slice(&logits, (rows, vocab), self.hidden.device())?;
                grad.t()?.matmul(&self.hidden)
            })
            .transpose()?;
        let hidden = head.backward(&CpuStorage::F32(logits), 0, rows)?;
        let hidden = Tensor::from_vec(hidden, self.hidden.shape(), self.hidden.device())?;
        Ok(HeadLoss { cross_entropy: sum(|row| row.0), divergence: sum(|row| row.1), hidden, weight })
    }

    /// The same by candle's differentiable primitives.
    fn primitive(&self, kernels: Kernels, wants_weight: bool) -> Result<HeadLoss> {
        let tau = self.weights.temperature;
        let (rows, device) = (self.targets.len(), self.hidden.device());
        let hidden = Var::from_tensor(&self.hidden)?;
        let weight = Var::from_tensor(&self.head.weight.to_dtype(self.hidden.dtype())?)?;
        let mut logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
        if let Some(cap) = self.head.softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        let targets = Tensor::from_slice(self.targets, (rows, 1), device)?;
        let hard = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?.sum_all()?.neg()?;
        let student = candle_nn::ops::log_softmax(&(&logits / tau)?, D::Minus1)?;
        let soft = match self.soft {
            Some(Soft::States(states, teacher)) => {
                let teacher_logits = kernels.capped(&states.narrow(0, self.first, rows)?, teacher)?;
                let teacher = Tensor::from_vec(teacher_logits, logits.shape(), device)?;
                let teacher = candle_nn::ops::log_softmax(&(teacher / tau)?, D::Minus1)?;
                Some((teacher.exp()? * (teacher - student)?)?.sum_all()?)
            }
            Some(Soft::Top(top)) => Some(self.primitive_top(top, &student)?),
            None => None,
        };
        let mut total = (&hard * self.weights.cross_entropy)?;
        let soft = soft.map(|soft| soft * (tau * tau)).transpose()?;
        if let Some(soft) = &soft {
            total = (total + (soft * self.weights.divergence)?)?;
        }
        let mut gradients = total.backward()?;
        let mut gradient = |var: &Var| match gradients.remove(var) {
            Some(gradient) => Ok(gradient),
            None => bail!("the loss at the head has no gradient"),
        };
        let scalar = |tensor: &Tensor| Result::Ok(f64::from(tensor.to_scalar::<f32>()?));
        Ok(HeadLoss {
            cross_entropy: scalar(&hard)?,
            divergence: soft.as_ref().map(scalar).transpose()?.unwrap_or_default(),
            hidden: gradient(&hidden)?,
            weight: wants_weight.then(|| gradient(&weight)).transpose()?,
        })
    }

    /// Σ KL over the outcomes of [`Soft::Top`], for the student's log-probabilities.
    fn primitive_top(&self, top: &TopTokens, student: &Tensor) -> Result<Tensor> {
        let (rows, count, device) = (self.targets.len(), top.count, student.device());
        let range = self.first * count..(self.first + rows) * count;
        let ids = Tensor::from_slice(&top.ids[range.clone()], (rows, count), device)?;
        let p = Tensor::from_slice(&top.probabilities[range], (rows, count), device)?;
        let rest = Tensor::from_slice(&top.rest[self.first..self.first + rows], (rows, 1), device)?;
        let chosen = student.gather(&ids, 1)?;
        let left =
            (student.exp()?.sum_keepdim(1)? - chosen.exp()?.sum_keepdim(1)?)?.maximum(f64::from(FLOOR))?;
        let log = |p: &Tensor| p.maximum(f64::from(FLOOR))?.log();
        let known = (&p * (log(&p)? - chosen)?)?.sum_all()?;
        known + (&rest * (log(&rest)? - left.log()?)?)?.sum_all()?
    }
}

/// Stands for probabilities of 0, whose logarithm is asked for and then multiplied by 0.
const FLOOR: f32 = 1e-30;

/// The terms of one row. Each replaces the row's logits, uncapped, by the derivative of the weighted loss with respect
/// to them, and gives the loss itself: cross-entropy, and τ² times the divergence.
#[derive(Clone, Copy)]
struct Terms {
    softcap: Option<f64>,
    weights: HeadWeights,
}

impl Terms {
    fn hard(self, row: &mut [f32], target: u32) -> f32 {
        vectorised(
            #[inline(always)]
            || {
                cap(row, self.softcap);
                let (weight, slope) = (self.weights.cross_entropy as f32, self.slope());
                let sum = log_sum_exp(row);
                let chosen = row[target as usize];
                map_in_place(row, |l| weight * exp(l - sum) * slope(l));
                row[target as usize] -= weight * slope(chosen);
                sum - chosen
            },
        )
    }

    fn full(self, row: &mut [f32], teacher: &[f32], target: u32) -> (f32, f32) {
        vectorised(
            #[inline(always)]
            || {
                cap(row, self.softcap);
                let slope = self.slope();
                let (tau, hard, soft) = self.scales();
                let inverse = 1.0 / tau;
                let sum = log_sum_exp(row);
                let (of_student, of_teacher) =
                    (log_sum_exp_at(row, inverse), log_sum_exp_at(teacher, inverse));
                let kl = sum2(
                    teacher,
                    row,
                    #[inline(always)]
                    |t, s| {
                        let t = t * inverse - of_teacher;
                        exp(t) * (t - (s * inverse - of_student))
                    },
                );
                let chosen = row[target as usize];
                for (l, &t) in row.iter_mut().zip(teacher) {
                    let difference = exp(*l * inverse - of_student) - exp(t * inverse - of_teacher);
                    *l = (hard * exp(*l - sum) + soft * difference) * slope(*l);
                }
                row[target as usize] -= hard * slope(chosen);
                (sum - chosen, tau * tau * kl)
            },
        )
    }

    #[inline(always)]
    fn top(self, row: &mut [f32], target: u32, ids: &[u32], p: &[f32], rest: f32) -> (f32, f32) {
        cap(row, self.softcap);
        let slope = self.slope();
        let (tau, hard, soft) = self.scales();
        let inverse = 1.0 / tau;
        let (sum, of_student) = (log_sum_exp(row), log_sum_exp_at(row, inverse));
        let chosen: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        let target_logit = row[target as usize];
        // What the student leaves for the rest is summed over the rest itself: 1 minus the chosen would cancel.
        for &id in ids {
            row[id as usize] = f32::NEG_INFINITY;
        }
        let left =
            sum2(row, row, |l, _| if l == f32::NEG_INFINITY { 0.0 } else { exp(l * inverse - of_student) });
        let log_rest = rest.max(FLOOR).ln();
        let mut kl = rest * (log_rest - left.max(FLOOR).ln());
        // Within the rest the student keeps its own proportions: only their sum is pulled at.
        let pull = 1.0 - rest / left.max(FLOOR);
        for l in row.iter_mut().filter(|l| **l != f32::NEG_INFINITY) {
            let likelihood = exp(*l * inverse - of_student);
            *l = (hard * exp(*l - sum) + soft * pull * likelihood) * slope(*l);
        }
        for ((&id, &p), &logit) in ids.iter().zip(p).zip(&chosen) {
            let log_likelihood = logit * inverse - of_student;
            kl += p * (p.max(FLOOR).ln() - log_likelihood);
            row[id as usize] = (hard * exp(logit - sum) + soft * (exp(log_likelihood) - p)) * slope(logit);
        }
        row[target as usize] -= hard * slope(target_logit);
        (sum - target_logit, tau * tau * kl)
    }

    /// The temperature, and what the derivatives of the two terms are multiplied by: one of the divergence's two
    /// factors τ is lost to the derivative of `l / τ`.
    #[inline(always)]
    fn scales(self) -> (f32, f32, f32) {
        let HeadWeights { cross_entropy, divergence, temperature } = self.weights;
        (temperature as f32, cross_entropy as f32, (divergence * temperature) as f32)
    }

    /// The derivative of a capped logit with respect to the uncapped one.
    #[inline(always)]
    fn slope(self) -> impl Fn(f32) -> f32 {
        let inverse = self.softcap.map_or(0.0, |cap| 1.0 / cap as f32);
        #[inline(always)]
        move |l| 1.0 - (l * inverse) * (l * inverse)
    }
}

#[inline(always)]
fn log_sum_exp(row: &[f32]) -> f32 {
    let mut sum = LogSumExp::EMPTY;
    sum.add(row);
    sum.value()
}

/// `log Σ exp(l · inverse)`, for a positive `inverse`.
#[inline(always)]
fn log_sum_exp_at(row: &[f32], inverse: f32) -> f32 {
    let highest = super::simd::max(row);
    let total = super::simd::sum(
        row,
        #[inline(always)]
        |l| exp((l - highest) * inverse),
    );
    highest * inverse + total.ln()
}

fn likeliest(row: &[f32], count: usize, tau: f32) -> (Vec<u32>, Vec<f32>, f32) {
    let sum = vectorised(
        #[inline(always)]
        || log_sum_exp_at(row, 1.0 / tau),
    );
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let logit = |id: u32| row[id as usize];
    let likelier = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, likelier);
        order.truncate(count);
    }
    order.sort_unstable_by(likelier);
    let probabilities: Vec<f32> = order.iter().map(|&id| exp(logit(id) / tau - sum)).collect();
    let rest = (1.0 - probabilities.iter().map(|&p| f64::from(p)).sum::<f64>()).max(0.0);
    let rest = if count == row.len() { 0.0 } else { rest as f32 };
    (order, probabilities, rest)
}
