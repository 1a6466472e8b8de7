//! Fields of a `config.json`, read with their types, and what they have in common across families.

use serde_json::{Map, Value};

use super::{FULL, LARGEST_SIZE, MOST_BLOCKS, SLIDING};
use crate::error::{Error, Result};
use crate::model::{
    Activation, Architecture, BlockSpec, FoldMap, MlpKind, NormKind, NormPlacement, Positions, RopeScaling,
    RopeSpec,
};

/// What a family assumes where its config is silent.
pub(super) struct Defaults {
    pub kv_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub norm_eps: f64,
    pub tied: bool,
    pub activation: &'static [&'static str],
    pub activation_default: &'static str,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            kv_heads: None,
            head_dim: None,
            norm_eps: 1e-6,
            tied: false,
            activation: &["hidden_act"],
            activation_default: "silu",
        }
    }
}

/// Typed access to the fields of a config.
pub(super) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn of(config: &'a Value) -> Result<Self> {
        config.as_object().map(Fields).ok_or_else(|| Error::config("", "expected a json object of fields"))
    }

    /// The field, where it is there and not null.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.0.contains_key(field)
    }

    pub(super) fn string(&self, field: &str) -> Result<&'a str> {
        let value = self.get(field).ok_or_else(|| Error::config(field, "missing"))?;
        value.as_str().ok_or_else(|| Error::config(field, format!("{value}, expected a string")))
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Error::config(field, format!("{value}, expected true or false")))
    }

    pub(super) fn size(&self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| Error::config(field, "missing"))
    }

    pub(super) fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(field)?.unwrap_or(default))
    }

    pub(super) fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|size| (1..=LARGEST_SIZE).contains(size)) {
            Some(size) => Ok(Some(size)),
            None => {
                Err(Error::config(field, format!("{value}, expected an integer from 1 to {LARGEST_SIZE}")))
            }
        }
    }

    pub(super) fn depth(&self, field: &str) -> Result<usize> {
        match self.size(field)? {
            depth if depth <= MOST_BLOCKS => Ok(depth),
            depth => Err(Error::config(field, format!("{depth}, expected at most {MOST_BLOCKS}"))),
        }
    }

    pub(super) fn optional_positive_or(&self, field: &str, default: Option<f64>) -> Result<Option<f64>> {
        // An explicit null switches the feature off; only silence means the default.
        if !self.has(field) {
            return Ok(default);
        }
        self.get(field).map(|value| positive(field, value)).transpose()
    }

    pub(super) fn positive_or(&self, field: &str, default: f64) -> Result<f64> {
        self.get(field).map_or(Ok(default), |value| positive(field, value))
    }

    pub(super) fn activation(&self, names: &[&str], default: &str) -> Result<Activation> {
        let named = names.iter().find_map(|&field| Some((field, self.get(field)?)));
        let Some((field, value)) = named else { return Ok(activation(default).unwrap_or(Activation::Silu)) };
        value.as_str().and_then(activation).ok_or_else(|| {
            let known = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu";
            Error::config(field, format!("{value} is not supported, expected one of {known}"))
        })
    }

    /// What changes the computation in ways that no family here knows.
    pub(super) fn refuse_unsupported(&self) -> Result<()> {
        if let Some(value) = self.get("quantization_config") {
            let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            let reason =
                format!("method {method} is not supported, expected unquantised safetensors or gguf");
            return Err(Error::config("quantization_config", reason));
        }
        for field in ["rope_interleaved", "use_bidirectional_attention", "is_encoder_decoder"] {
            if self.flag(field, false)? {
                return Err(Error::config(field, "true is not supported, expected false"));
            }
        }
        Ok(())
    }

    /// `layer_types`, true where a block slides.
    pub(super) fn layer_types(&self, depth: usize) -> Result<Option<Vec<bool>>> {
        let Some(value) = self.get("layer_types") else { return Ok(None) };
        let types = value
            .as_array()
            .ok_or_else(|| Error::config("layer_types", format!("{value}, expected a list")))?;
        if types.len() != depth {
            let reason = format!("{} entries, expected one for each of {depth} blocks", types.len());
            return Err(Error::config("layer_types", reason));
        }
        let slides = types.iter().enumerate().map(|(index, kind)| match kind.as_str() {
            Some(SLIDING) => Ok(true),
            Some(FULL) => Ok(false),
            _ => {
                let reason = format!("{kind} is not supported, expected {SLIDING} or {FULL}");
                Err(Error::config(format!("layer_types[{index}]"), reason))
            }
        });
        slides.collect::<Result<_>>().map(Some)
    }

    /// The window of each block of a Qwen model.
    pub(super) fn qwen_sliding(&self, depth: usize) -> Result<Vec<Option<usize>>> {
        let window = match self.flag("use_sliding_window", false)? {
            true if self.has("sliding_window") => self.optional_size("sliding_window")?,
            true => Some(4096),
            false => None,
        };
        // Blocks below this one see everything; unlike other sizes it may be 0.
        let first = match self.get("max_window_layers") {
            None => 28,
            Some(value) => value.as_u64().and_then(|first| usize::try_from(first).ok()).ok_or_else(|| {
                Error::config("max_window_layers", format!("{value}, expected a number of blocks"))
            })?,
        };
        let types = self.layer_types(depth)?;
        let slides = |index: usize| match &types {
            Some(types) => types.get(index).copied().unwrap_or_default(),
            None => index >= first,
        };
        Ok((0..depth).map(|index| window.filter(|_| slides(index))).collect())
    }

    /// The rotary embedding; `kind` chooses where a config keeps one for each kind of attention.
    pub(super) fn rope(&self, head_dim: usize, kind: Option<&str>, default_theta: f64) -> Result<RopeSpec> {
        let shared = self.get("rope_parameters");
        let own = kind.and_then(|kind| shared?.get(kind));
        let (name, scaling) = match (own.or(shared), self.get("rope_scaling")) {
            (Some(parameters), _) => ("rope_parameters", Some(parameters)),
            (None, scaling) => ("rope_scaling", scaling),
        };
        let field = |key: &str| scaling.and_then(|scaling| scaling.get(key)).filter(|value| !value.is_null());
        let theta = match field("rope_theta") {
            Some(value) => positive("rope_parameters.rope_theta", value)?,
            None => self.positive_or("rope_theta", default_theta)?,
        };
        let partial = match field("partial_rotary_factor") {
            Some(value) => positive("rope_parameters.partial_rotary_factor", value)?,
            None => self.positive_or("partial_rotary_factor", 1.0)?,
        };
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            let reason =
                format!("{partial} of {head_dim} is {rotary_dim}, expected an even number up to {head_dim}");
            return Err(Error::config("partial_rotary_factor", reason));
        }
        let required = |key: &str| match field(key) {
            Some(value) => positive(&format!("{name}.{key}"), value),
            None => Err(Error::config(format!("{name}.{key}"), "missing")),
        };
        let kind = field("rope_type").or_else(|| field("type"));
        let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None | Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear { factor: required("factor")? },
            Some("llama3") => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if low >= high {
                    let reason = format!("{low} is not below high_freq_factor {high}");
                    return Err(Error::config(format!("{name}.low_freq_factor"), reason));
                }
                RopeScaling::Llama3 {
                    factor: required("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: required("original_max_position_embeddings")? as usize,
                }
            }
            Some(other) => {
                let reason = format!("`{other}` is not supported, expected default, linear or llama3");
                return Err(Error::config(format!("{name}.rope_type"), reason));
            }
        };
        Ok(RopeSpec { theta, rotary_dim, scaling })
    }

    /// What all families with RoPE, RMS norms and gated MLPs have in common.
    pub(super) fn rotary_family(&self, defaults: &Defaults) -> Result<Architecture> {
        let (hidden, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let head_dim = match self.optional_size("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => divided("hidden_size", hidden, "num_attention_heads", heads)?,
        };
        let block = BlockSpec { window: None, rope: self.rope(head_dim, None, 10_000.0)? };
        Ok(Architecture {
            model_type: self.string("model_type")?.into(),
            vocab_size: self.size("vocab_size")?,
            hidden_size: hidden,
            intermediate_size: self.size("intermediate_size")?,
            num_attention_heads: heads,
            // An explicit null means as many as query heads, silence the family's own number.
            num_key_value_heads: match defaults.kv_heads.filter(|_| !self.has("num_key_value_heads")) {
                Some(default) => default,
                None => self.size_or("num_key_value_heads", heads)?,
            },
            head_dim,
            max_position_embeddings: self.size_or("max_position_embeddings", 2048)?,
            norm: NormKind::Rms { unit_offset: false },
            norm_eps: self.positive_or("rms_norm_eps", defaults.norm_eps)?,
            norm_placement: NormPlacement::Pre,
            qk_norm: None,
            mlp: MlpKind::Gated,
            activation: self.activation(defaults.activation, defaults.activation_default)?,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            positions: Positions::Rotary,
            embedding_scale: None,
            attention_scale: (head_dim as f64).powf(-0.5),
            attention_softcap: None,
            logit_softcap: None,
            tied: self.flag("tie_word_embeddings", defaults.tied)?,
            blocks: vec![block; self.depth("num_hidden_layers")?],
            fold: FoldMap::default(),
        })
    }
}

pub(super) fn positive(field: &str, value: &Value) -> Result<f64> {
    let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| Error::config(field, format!("{value}, expected a positive number")))
}

pub(super) fn divided(whole: &str, a: usize, parts: &str, b: usize) -> Result<usize> {
    if a.is_multiple_of(b) {
        return Ok(a / b);
    }
    Err(Error::config(parts, format!("{b} does not divide {whole} {a}")))
}

pub(super) fn activation(name: &str) -> Option<Activation> {
    match name {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_tanh" => Some(Activation::GeluTanh),
        "gelu" => Some(Activation::GeluErf),
        "relu" => Some(Activation::Relu),
        _ => None,
    }
}
