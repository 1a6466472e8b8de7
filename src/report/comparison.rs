//! Before and after, row by row.

use serde::{Deserialize, Serialize};

use crate::eval::Throughput;
use crate::pipeline::{Measured, Report};

/// A quantity of each model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Row {
    /// What it is.
    pub quantity: String,
    /// In what; empty for counts and shares.
    pub unit: String,
    /// That of the model as it was.
    pub dense: Option<Value>,
    /// That of the folded model before it was healed, where it was.
    pub folded: Option<Value>,
    /// That of what was saved.
    pub compressed: Option<Value>,
    /// Of the compressed model, less that of the dense one.
    pub difference: Option<f64>,
    /// The difference as a share of the dense model's.
    pub relative: Option<f64>,
    /// Digits after the point that are shown.
    pub digits: usize,
}

/// A value, and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Value {
    /// The value.
    pub value: f64,
    /// Its standard error, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// The least and the greatest of several runs, of which this is the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self { value, error: None, range: None }
    }
}

impl From<Throughput> for Value {
    fn from(speed: Throughput) -> Self {
        Self { value: speed.median, error: None, range: Some([speed.min, speed.max]) }
    }
}

/// A quantity of a measured model, where it has it.
type Quantity<'a> = &'a dyn Fn(&Measured) -> Option<Value>;

impl Report {
    /// Every quantity of the models before and after.
    #[must_use]
    pub fn comparison(&self) -> Vec<Row> {
        let mut rows = vec![
            self.row("blocks", "", 0, &|model| some(model.blocks as f64)),
            self.row("parameters", "", 0, &|model| some(model.parameters as f64)),
            Row::new(
                "stored tensors",
                "bytes",
                0,
                [some(self.dense_bytes as f64), None, some(self.saved_bytes as f64)],
            ),
            self.row("NLL", "nats per token", 4, &|model| some(model.perplexity.mean_nll)),
            self.row("perplexity", "", 2, &|model| some(model.perplexity.perplexity)),
            self.row("FLOPs per token", "", 0, &|model| some(model.account?.flops_per_token as f64)),
            self.row("resident bytes", "", 0, &|model| some(model.account?.resident_bytes as f64)),
            self.row("KV bytes per token", "", 0, &|model| some(model.account?.kv_bytes_per_token as f64)),
            self.row("prefill", "tokens per second", 0, &|model| {
                Some(model.latency.as_ref()?.prefill.into())
            }),
            self.row("decode", "tokens per second", 1, &|model| Some(model.latency.as_ref()?.decode.into())),
        ];
        for name in self.dense.tasks.keys() {
            let task = |model: &Measured| model.tasks.get(name).cloned();
            let percent = |value: f64, error: Option<f64>| Value {
                value: 100.0 * value,
                error: error.map(|error| 100.0 * error),
                range: None,
            };
            rows.push(self.row(&format!("{name}, accuracy"), "%", 2, &|model| {
                task(model).map(|task| percent(task.acc, task.stderr))
            }));
            rows.push(self.row(&format!("{name}, accuracy by length"), "%", 2, &|model| {
                task(model).and_then(|task| Some(percent(task.acc_norm?, task.acc_norm_stderr)))
            }));
            rows.push(self.row(&format!("{name}, perplexity"), "", 2, &|model| {
                task(model)?.perplexity.map(Value::from)
            }));
        }
        rows.retain(|row| row.dense.is_some() || row.compressed.is_some());
        rows
    }

    /// What the compressed model is called.
    pub(super) fn result_name(&self) -> &'static str {
        if self.heal.is_some() { "healed" } else { "compressed" }
    }

    fn row(&self, quantity: &str, unit: &str, digits: usize, of: Quantity<'_>) -> Row {
        let values = [of(&self.dense), self.folded.as_ref().and_then(of), of(&self.compressed)];
        Row::new(quantity, unit, digits, values)
    }
}

impl Row {
    /// A quantity of the dense, the folded and the compressed model.
    fn new(quantity: &str, unit: &str, digits: usize, values: [Option<Value>; 3]) -> Self {
        let [dense, folded, compressed] = values;
        let difference = dense.zip(compressed).map(|(dense, compressed)| compressed.value - dense.value);
        // Percentages differ by points, and a share of them says nothing.
        let base = dense.map(|dense| dense.value).filter(|value| *value != 0.0 && unit != "%");
        let relative = difference.zip(base).map(|(difference, base)| difference / base);
        let (quantity, unit) = (quantity.to_string(), unit.to_string());
        Self { quantity, unit, dense, folded, compressed, difference, relative, digits }
    }
}

#[allow(clippy::unnecessary_wraps)] // what most rows have
fn some(value: f64) -> Option<Value> {
    Some(value.into())
}
