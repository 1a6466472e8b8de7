//! A healing between two steps, and its file.
//!
//! The file is in the safetensors format: `value`, `mean` and `variance` of every trained tensor, `best` where the best
//! ones are kept, all in f32, and in the metadata the rest as JSON. Which windows come next follows from the seed and
//! the number of steps; so does everything else that is drawn.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::adamw::Moments;
use super::identity::Identity;
use super::trainable::{Student, Trained};
use crate::checkpoint::{self, Entry};
use crate::error::{Error, Result};
use crate::file;

const VERSION: u32 = 2;
const METADATA: &str = "heal";
/// What is kept of every trained tensor, the last where there is a best.
const KINDS: [&str; 4] = ["value", "mean", "variance", "best"];
/// Numbers turned into bytes at once.
const CHUNK: usize = 1 << 16;

/// Where a healing stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Position {
    version: u32,
    /// What the state belongs to: options, text, model and teacher.
    identity: Identity,
    /// Steps that are done.
    pub step: usize,
    /// Seconds spent on them.
    pub seconds: f64,
    /// The losses on the held-out windows, with the steps they were measured after.
    pub held_out: Vec<(usize, f64)>,
    /// Whether it is over before its budget, for want of progress.
    pub stopped: bool,
}

/// A healing between two steps: where it stands, the optimiser's moments, and the best values so far. The values
/// themselves are the student's variables.
#[derive(Debug)]
pub(super) struct State {
    pub position: Position,
    pub moments: Vec<Moments>,
    pub best: Option<Vec<Vec<f32>>>,
}

impl Position {
    /// The step after which the held-out loss was lowest, and that loss.
    pub(super) fn best(&self) -> Option<(usize, f64)> {
        self.held_out.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl State {
    pub(super) fn new(identity: Identity, student: &Student) -> Self {
        let position = Position {
            version: VERSION,
            identity,
            step: 0,
            seconds: 0.0,
            held_out: Vec::new(),
            stopped: false,
        };
        let moments =
            student.trained.iter().map(|trained| Moments::zeros(trained.var.elem_count())).collect();
        Self { position, moments, best: None }
    }

    /// Keeps the student's values as the best ones.
    pub(super) fn keep_best(&mut self, student: &Student) -> Result<()> {
        self.best = Some(student.trained.iter().map(values).collect::<Result<_>>()?);
        Ok(())
    }

    /// Gives the student the best values, where there are any.
    pub(super) fn restore_best(&self, student: &Student) -> Result<()> {
        let best = self.best.iter().flatten();
        student.trained.iter().zip(best).try_for_each(|(trained, values)| set(trained, values))
    }

    /// Writes it with the student's values, tensor by tensor: complete, or not at all.
    pub(super) fn save(&self, path: &Path, student: &Student) -> Result<()> {
        let beginning = self.beginning(path, student)?;
        file::replace(path, |file| {
            let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", path));
            put(&beginning)?;
            for (place, (trained, moments)) in student.trained.iter().zip(&self.moments).enumerate() {
                let value = values(trained)?;
                let best = self.best.as_ref().and_then(|best| best.get(place));
                let tensors = [Some(&value), Some(&moments.mean), Some(&moments.variance), best];
                for numbers in tensors.into_iter().flatten().flat_map(|tensor| tensor.chunks(CHUNK)) {
                    put(&numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())?;
                }
            }
            Ok(())
        })
    }

    /// What the file begins with: the position, and which tensors follow, in the order of writing.
    fn beginning(&self, path: &Path, student: &Student) -> Result<Vec<u8>> {
        let json = serde_json::to_string(&self.position);
        let json = json.map_err(|error| Error::format(path, error.to_string()))?;
        let kinds = if self.best.is_some() { &KINDS[..] } else { &KINDS[..KINDS.len() - 1] };
        let tensors = student.trained.iter().flat_map(|trained| {
            kinds.iter().map(|kind| (name(kind, trained), DType::F32, trained.var.dims()))
        });
        checkpoint::beginning(path, HashMap::from([(METADATA.to_string(), json)]), tensors)
    }

    /// The state in a file, which has to be one of this healing, read tensor by tensor; the student gets its values.
    pub(super) fn read(path: &Path, identity: &Identity, student: &Student) -> Result<Self> {
        let unreadable = |reason: String| Error::format(path, format!("is no state of a healing: {reason}"));
        let (about, stored) = checkpoint::header(path).map_err(|error| match error {
            Error::Format { reason, .. } => unreadable(reason),
            other => other,
        })?;
        let json =
            about.get(METADATA).ok_or_else(|| unreadable(format!("it has no metadata `{METADATA}`")))?;
        let position: Position = serde_json::from_str(json).map_err(|error| unreadable(error.to_string()))?;
        if position.version != VERSION || position.identity != *identity {
            let differ = position.identity.differences(identity).join(", ");
            let reason = format!(
                "is the state of another healing ({differ}): delete it, or keep this one's elsewhere"
            );
            return Err(Error::format(path, reason));
        }
        let get = |kind, trained: &Trained| read(path, &stored, &name(kind, trained), trained);
        let mut moments = Vec::new();
        for trained in &student.trained {
            set(trained, &get("value", trained)?)?;
            moments.push(Moments { mean: get("mean", trained)?, variance: get("variance", trained)? });
        }
        let best =
            position.best().map(|_| student.trained.iter().map(|trained| get("best", trained)).collect());
        Ok(Self { position, moments, best: best.transpose()? })
    }
}

/// The values of a trained tensor, in order.
pub(super) fn values(trained: &Trained) -> Result<Vec<f32>> {
    Ok(trained.var.flatten_all()?.to_vec1::<f32>()?)
}

/// Gives a trained tensor these values.
pub(super) fn set(trained: &Trained, values: &[f32]) -> Result<()> {
    Ok(trained.var.set(&Tensor::from_slice(values, trained.var.shape(), trained.var.device())?)?)
}

fn name(kind: &str, trained: &Trained) -> String {
    format!("{kind} of {}", trained.param)
}

fn read(path: &Path, stored: &BTreeMap<String, Entry>, name: &str, trained: &Trained) -> Result<Vec<f32>> {
    let damaged = |reason: String| Error::tensor(path, name, reason);
    let entry = stored.get(name).ok_or_else(|| damaged("missing".into()))?;
    if entry.dtype != DType::F32 || entry.shape != trained.var.dims() {
        let found = format!("{:?} of shape {:?}", entry.dtype, entry.shape);
        return Err(damaged(format!("is {found}, expected f32 of shape {:?}", trained.var.dims())));
    }
    Ok(entry.bytes()?.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}
