//! Typed access to the key–value metadata of a GGUF file.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;

use crate::error::{Error, Result};

/// The metadata of one GGUF file, with the path its errors name.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    path: &'a Path,
    values: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(path: &'a Path, values: &'a HashMap<String, Value>) -> Self {
        Self { path, values }
    }

    /// The value under `key`, `None` where the file has none; an error where it is of another type.
    pub(super) fn get<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::format(
                self.path,
                format!("metadata `{key}` is {}, expected {}", described(value), T::EXPECTED),
            )),
        }
    }

    /// The value under `key`; an error where the file has none.
    pub(super) fn require<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| {
            Error::format(self.path, format!("metadata `{key}` is missing, expected {}", T::EXPECTED))
        })
    }
}

/// A short form of a value for an error: scalars as they are, the rest by their type.
fn described(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("an array of {} elements", items.len()),
        Value::String(_) => "a string".to_owned(),
        scalar => format!("{scalar:?}"),
    }
}

/// A type that a metadata value can be read as.
pub(super) trait FromValue<'a>: Sized {
    /// The type's name in an error message.
    const EXPECTED: &'static str;

    /// The value as this type, `None` where it is another.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl FromValue<'_> for usize {
    const EXPECTED: &'static str = "a non-negative integer";

    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => v.try_into().ok(),
            Value::U64(v) => v.try_into().ok(),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a finite number";

    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
        .filter(|v| v.is_finite())
    }
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a finite number";

    /// An f32 becomes the shortest decimal that it stands for: 1e-5, not 9.99999974e-6.
    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::F32(v) => v.to_string().parse().ok(),
            Value::F64(v) => Some(v),
            _ => None,
        }
        .filter(|v: &f64| v.is_finite())
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a boolean";

    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Bool(v) = value { Some(*v) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::String(v) = value { Some(v) } else { None }
    }
}

impl<'a, T: FromValue<'a>> FromValue<'a> for Vec<T> {
    const EXPECTED: &'static str = "an array of one type";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Array(items) = value { items.iter().map(T::from_value).collect() } else { None }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_their_type_and_errors_name_the_key() {
        let values = HashMap::from([
            ("eps".to_owned(), Value::F32(1e-5)),
            ("depth".to_owned(), Value::I32(-1)),
            ("list".to_owned(), Value::Array(vec![Value::U8(3), Value::U8(4)])),
        ]);
        let metadata = Metadata::new(Path::new("m.gguf"), &values);
        assert!((metadata.require::<f64>("eps").unwrap() - 1e-5).abs() < f64::EPSILON);
        assert_eq!(metadata.require::<Vec<usize>>("list").unwrap(), [3, 4]);
        assert_eq!(metadata.get::<usize>("absent").unwrap(), None);
        let message = metadata.require::<usize>("depth").unwrap_err().to_string();
        assert!(message.contains("m.gguf") && message.contains("`depth`"), "{message}");
        assert!(metadata.require::<usize>("absent").unwrap_err().to_string().contains("missing"));
        assert!(metadata.get::<usize>("list").unwrap_err().to_string().contains("array of 2"));
    }
}
