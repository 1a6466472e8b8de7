//! What a healing's state belongs to, and in what two healings differ.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::options::Heal;
use super::teacher::Teacher;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{BlockSource, Decoder};

/// All that the weights in the end depend on, by what people call it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Identity(serde_json::Map<String, Value>);

impl Identity {
    pub(super) fn of(
        heal: &Heal,
        decoder: &Decoder,
        windows: &Windows,
        held_out: Option<&Windows>,
        teacher: Option<Teacher<'_>>,
    ) -> Result<Self> {
        let teacher = teacher.filter(|_| heal.losses.need_teacher()).map(Teacher::identity).transpose()?;
        let options = serde_json::to_value(heal.deciding())
            .map_err(|error| Error::argument("heal", error, "options that json can hold"))?;
        let of_text = (windows.ids_sha256(), held_out.map(Windows::ids_sha256));
        let parts = [
            ("version", env!("CARGO_PKG_VERSION").into()),
            ("kernels", format!("{:?}", decoder.kernels()).into()),
            ("model", decoder.fingerprint()?.into()),
            ("type of matrices", format!("{:?}", decoder.dtype()).into()),
            ("text", of_text.0.into()),
            ("held-out text", of_text.1.into()),
            ("teacher", teacher.into()),
            ("options", options),
        ];
        Ok(Self(parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()))
    }

    /// The names of what is not the same in both, options one by one.
    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let mut names = Vec::new();
        for (name, value) in &self.0 {
            let (Value::Object(fields), Some(Value::Object(others))) = (value, other.0.get(name)) else {
                names.extend((other.0.get(name) != Some(value)).then(|| name.clone()));
                continue;
            };
            names.extend(
                fields
                    .iter()
                    .filter(|(key, field)| others.get(*key) != Some(*field))
                    .map(|(key, _)| key.clone()),
            );
        }
        names
    }
}
