//! Whom the student learns from.

use candle_core::Tensor;

use super::cache::TeacherCache;
use super::losses::Losses;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::ops::{Head, Soft, TopTokens};

/// The original model, or what it had to say.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Teacher<'a> {
    /// In memory. Tensors that the student did not change are the same ones in both, and cost nothing.
    Model(&'a Decoder),
    /// Its last states and likeliest tokens on the same windows, in a file.
    Cache(&'a TeacherCache),
}

/// What a teacher has to say of one micro-batch.
#[derive(Debug)]
pub(super) struct Lesson<'a> {
    /// States after its last blocks, last first, `(batch, seq, hidden)` each.
    pub tail: Vec<Tensor>,
    likelihoods: Option<Likelihoods<'a>>,
}

#[derive(Debug)]
enum Likelihoods<'a> {
    /// Normalised states, `(batch · seq, hidden)`, and the head that reads them.
    States(Tensor, Head<'a>),
    Top(TopTokens),
}

impl Lesson<'_> {
    /// Nothing: without a teacher.
    pub(super) fn none() -> Self {
        Self { tail: Vec::new(), likelihoods: None }
    }

    pub(super) fn new(tail: Vec<Tensor>, top: Option<TopTokens>) -> Self {
        Self { tail, likelihoods: top.map(Likelihoods::Top) }
    }

    /// What is expected after each token.
    pub(super) fn soft(&self) -> Option<Soft<'_>> {
        self.likelihoods.as_ref().map(|likelihoods| match likelihoods {
            Likelihoods::States(states, head) => Soft::States(states, *head),
            Likelihoods::Top(top) => Soft::Top(top),
        })
    }
}

impl<'a> Teacher<'a> {
    /// Fails where the teacher cannot say what the losses ask, of this student on these windows.
    pub(super) fn check(self, losses: &Losses, student: &Decoder, windows: &Windows) -> Result<()> {
        let arch = student.architecture();
        let (vocab, hidden, depth) = match self {
            Self::Model(teacher) => {
                if losses.divergence > 0.0 {
                    teacher.head()?;
                }
                let arch = teacher.architecture();
                (arch.vocab_size, arch.hidden_size, teacher.depth())
            }
            Self::Cache(cache) => cache.check(losses, windows)?,
        };
        if losses.divergence > 0.0 && vocab != arch.vocab_size {
            let expected = format!("{} as the student's", arch.vocab_size);
            return Err(Error::argument("the teacher's vocabulary", vocab, expected));
        }
        if losses.tail > 0.0 && hidden != arch.hidden_size {
            let expected = format!("{} as the student's", arch.hidden_size);
            return Err(Error::argument("the teacher's hidden size", hidden, expected));
        }
        losses.check(student.depth(), Some(depth))
    }

    /// What tells it from other teachers.
    pub(super) fn identity(self) -> Result<String> {
        match self {
            Self::Model(teacher) => teacher.fingerprint(),
            Self::Cache(cache) => Ok(cache.identity()),
        }
    }

    /// What it has to say of `ids`, `(batch, seq)`, the first tokens of these windows.
    pub(super) fn lesson(self, losses: &Losses, windows: &[usize], ids: &Tensor) -> Result<Lesson<'a>> {
        match self {
            _ if !losses.need_teacher() => Ok(Lesson::none()),
            Self::Model(teacher) => {
                let (tail, output) = last_states(teacher, ids, losses.tail_depth())?;
                let states = |output: Tensor| -> Result<_> {
                    Ok(Likelihoods::States(teacher.normalised(&output.flatten_to(1)?)?, teacher.head()?))
                };
                let likelihoods = (losses.divergence > 0.0).then(|| states(output)).transpose()?;
                Ok(Lesson { tail, likelihoods })
            }
            Self::Cache(cache) => cache.lesson(losses, windows, ids),
        }
    }
}

/// The states after the last `count` blocks, last first, and the last one whether it is among them or not.
pub(super) fn last_states(teacher: &Decoder, ids: &Tensor, count: usize) -> Result<(Vec<Tensor>, Tensor)> {
    let pass = teacher.pass(0, ids.dims2()?.1)?;
    let mut tail = Vec::with_capacity(count);
    let mut x = teacher.embed(ids, &pass)?;
    for index in 0..teacher.depth() {
        x = teacher.run_block(index, &x, &pass)?;
        if index + count >= teacher.depth() {
            tail.push(x.clone());
        }
    }
    tail.reverse();
    Ok((tail, x))
}
