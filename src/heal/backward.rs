//! One micro-batch forward and back, block by block.
//!
//! Only the input of every block is kept; each block is computed again on the way back, with its trained tensors as
//! variables. Memory beyond the weights: the inputs, one block's activations, one chunk of logits.

use candle_core::Tensor;

use super::losses::{Losses, Terms, relative_distance};
use super::teacher::Lesson;
use super::trainable::Student;
use crate::error::{Error, Result};
use crate::model::{Param, Pass};

/// The gradients of a step, summed over its micro-batches.
pub(super) struct Gradients(Vec<Option<Tensor>>);

/// Which trained tensors a part of the decoder uses.
pub(super) struct Uses {
    blocks: Vec<Vec<usize>>,
    embedding: Vec<usize>,
    final_norm: Vec<usize>,
    head: Option<usize>,
    /// Blocks before this one need no gradients at all.
    first: usize,
}

impl Gradients {
    pub(super) fn none(count: usize) -> Self {
        Self(vec![None; count])
    }

    fn add(&mut self, places: &[usize], gradients: impl IntoIterator<Item = Option<Tensor>>) -> Result<()> {
        for (&place, gradient) in places.iter().zip(gradients) {
            let (Some(sum), Some(gradient)) = (self.0.get_mut(place), gradient) else { continue };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + gradient)?,
                None => gradient.detach(),
            });
        }
        Ok(())
    }

    /// The gradient of every trained tensor of `student`.
    pub(super) fn complete(self, student: &Student) -> Result<Vec<Tensor>> {
        let named = self.0.into_iter().zip(&student.trained);
        named
            .map(|(gradient, trained)| {
                gradient.ok_or_else(|| Error::NoGradient { tensor: trained.param.to_string() })
            })
            .collect()
    }
}

impl Uses {
    pub(super) fn of(student: &Student) -> Self {
        let depth = student.plain.depth();
        let block =
            |index| student.trained_in(move |param| matches!(param, Param::Block(at, _) if at == index));
        let blocks: Vec<Vec<usize>> = (0..depth).map(block).collect();
        let embedding = student.trained_in(|param| matches!(param, Param::Embedding | Param::Positions));
        let tied = student.plain.architecture().tied;
        let head = if tied { Param::Embedding } else { Param::Head };
        let first =
            if embedding.is_empty() { blocks.iter().position(|uses| !uses.is_empty()) } else { Some(0) };
        Self {
            blocks,
            embedding,
            final_norm: student.trained_in(|param| matches!(param, Param::FinalNorm(_))),
            head: student.trained_in(|param| param == head).first().copied(),
            first: first.unwrap_or(depth),
        }
    }
}

/// How the gradients of a micro-batch are made.
pub(super) struct Backward<'a> {
    pub student: &'a Student,
    pub uses: &'a Uses,
    pub losses: &'a Losses,
    /// What the loss of every token is multiplied by.
    pub weight: f64,
}

impl Backward<'_> {
    /// Adds the gradients of `weight · Σ loss` over the tokens of `ids`, `(batch, seq)`, to `gradients`; the terms of
    /// the loss, summed over tokens.
    pub(super) fn accumulate(
        &self,
        (ids, targets): (&Tensor, &[u32]),
        lesson: &Lesson<'_>,
        gradients: &mut Gradients,
    ) -> Result<Terms> {
        let Self { student, uses, .. } = *self;
        let (plain, tail) = (&student.plain, &lesson.tail);
        let pass = plain.pass(0, ids.dims2()?.1)?;
        let (mut states, mut output) = self.forward(ids, &pass, tail.len())?;
        let mut terms = Terms::default();
        let mut upstream = self.head(&output, targets, lesson, gradients, &mut terms)?;
        let weight = self.losses.tail * self.weight / tail.len().max(1) as f64;
        let mut tail_states = tail.iter();
        for index in (0..plain.depth()).rev() {
            let held = tail_states.next();
            if let Some(teacher) = held {
                let (distance, gradient) = relative_distance(&output, teacher)?;
                terms.tail += distance / tail.len() as f64;
                upstream = (upstream + (gradient * weight)?)?;
            }
            if index < uses.first && held.is_none() {
                break;
            }
            let Some(x) = states.pop() else { break };
            if index >= uses.first {
                let places = uses.blocks.get(index).map(Vec::as_slice).unwrap_or_default();
                let wanted = self.variables(places);
                // Nothing before the first block that is trained asks for a gradient, unless the embedding does.
                let input = (&x, index > uses.first || !uses.embedding.is_empty());
                let (through, found) = student.tracked.block_vjp(index, input, &upstream, wanted, &pass)?;
                gradients.add(places, found)?;
                upstream = through.unwrap_or(upstream);
            }
            output = x;
        }
        if !uses.embedding.is_empty() {
            let wanted = self.variables(&uses.embedding);
            gradients.add(&uses.embedding, student.tracked.embedding_vjp(ids, &upstream, wanted)?)?;
        }
        Ok(terms)
    }

    /// The input of every block that the way back or a loss reaches, and the last block's output.
    fn forward(&self, ids: &Tensor, pass: &Pass<'_>, tail: usize) -> Result<(Vec<Tensor>, Tensor)> {
        let plain = &self.student.plain;
        let mut states = Vec::with_capacity(plain.depth());
        let mut x = plain.embed(ids, pass)?;
        for index in 0..plain.depth() {
            let y = plain.run_block(index, &x, pass)?;
            let x = std::mem::replace(&mut x, y);
            if index >= self.uses.first || index + tail >= plain.depth() {
                states.push(x);
            }
        }
        Ok((states, x))
    }

    /// The gradient of the losses at the head with respect to the last block's output, `(batch, seq, hidden)`.
    fn head(
        &self,
        output: &Tensor,
        targets: &[u32],
        lesson: &Lesson<'_>,
        gradients: &mut Gradients,
        terms: &mut Terms,
    ) -> Result<Tensor> {
        let Self { student, uses, losses, weight } = *self;
        if losses.cross_entropy == 0.0 && losses.divergence == 0.0 {
            return Ok(output.zeros_like()?);
        }
        let rows = output.flatten_to(1)?; // (batch · seq, hidden)
        let normalised = student.plain.normalised(&rows)?;
        let weights = losses.head().scaled(weight);
        let loss =
            student.plain.head_loss(&normalised, targets, lesson.soft(), weights, uses.head.is_some())?;
        terms.cross_entropy += loss.cross_entropy;
        terms.divergence += loss.divergence;
        gradients.add(uses.head.as_slice(), [loss.weight])?;
        let wanted = self.variables(&uses.final_norm);
        let (through, found) = student.tracked.final_norm_vjp(&rows, &loss.hidden, wanted)?;
        gradients.add(&uses.final_norm, found)?;
        Ok(through.reshape(output.shape())?)
    }

    fn variables(&self, places: &[usize]) -> Vec<Tensor> {
        let trained = places.iter().filter_map(|&place| self.student.trained.get(place));
        trained.map(|trained| trained.var.as_tensor().clone()).collect()
    }
}
