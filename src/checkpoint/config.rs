//! `config.json` to [`Architecture`]: one mapping for each family.

use serde_json::{Map, Value};

use super::compact;
use crate::error::{Error, Result};
use crate::model::{
    Activation, Architecture, BlockSpec, FoldMap, MlpKind, NormKind, NormPlacement, Positions, QkNorm,
    RopeScaling, RopeSpec,
};

/// The families that can be loaded, as `model_type` names them.
pub(crate) const MODEL_TYPES: [&str; 10] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2"];

/// Sizes beyond these are not models but mistakes, or attempts to exhaust memory.
const MOST_BLOCKS: usize = 4096;
const LARGEST_SIZE: usize = 1 << 30;
const MOST_PARAMETERS: u64 = 1 << 44;

impl Architecture {
    /// The architecture that a `config.json` describes.
    ///
    /// # Errors
    /// [`Error::Config`] with the field that is missing, contradictory or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        architecture(config)
    }
}

fn architecture(config: &Value) -> Result<Architecture> {
    let fields = Fields::of(config)?;
    let model_type = fields.string("model_type")?;
    fields.refuse_unsupported()?;
    let mut arch = match model_type {
        "llama" => llama(&fields)?,
        "mistral" => mistral(&fields)?,
        "qwen2" => qwen2(&fields)?,
        "qwen3" => qwen3(&fields)?,
        "gemma" => gemma(&fields)?,
        "gemma2" => gemma2(&fields)?,
        "gemma3_text" => gemma3(&fields)?,
        "phi3" => phi3(&fields)?,
        "olmo2" => olmo2(&fields)?,
        "gpt2" => gpt2(&fields)?,
        other => {
            let reason = format!("`{other}` is not supported, expected one of {}", MODEL_TYPES.join(", "));
            return Err(Error::config("model_type", reason));
        }
    };
    arch.fold = compact::fold_map(config, &arch)?;
    check(&arch)?;
    Ok(arch)
}

/// The fields that hold the number of blocks, one of which every config has.
pub(crate) fn depth_field(config: &Value) -> &'static str {
    if config.get("model_type").and_then(Value::as_str) == Some("gpt2") {
        "n_layer"
    } else {
        "num_hidden_layers"
    }
}

/// What a block attends to, as `layer_types` says it.
pub(crate) fn layer_type(spec: &BlockSpec) -> &'static str {
    if spec.window.is_some() { SLIDING } else { FULL }
}

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

fn llama(fields: &Fields<'_>) -> Result<Architecture> {
    let attention_bias = fields.flag("attention_bias", false)?;
    let base = fields.rotary_family(&Defaults::default())?;
    Ok(Architecture {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias", false)?,
        ..base
    })
}

fn mistral(fields: &Fields<'_>) -> Result<Architecture> {
    let window =
        if fields.has("sliding_window") { fields.optional_size("sliding_window")? } else { Some(4096) };
    let base = fields.rotary_family(&Defaults { kv_heads: Some(8), ..Defaults::default() })?;
    Ok(with_windows(base, |_| window))
}

fn qwen2(fields: &Fields<'_>) -> Result<Architecture> {
    let base = fields.rotary_family(&Defaults::default())?;
    let sliding = fields.qwen_sliding(base.depth())?;
    Ok(Architecture { qkv_bias: true, ..with_windows(base, |index| sliding.get(index).copied().flatten()) })
}

fn qwen3(fields: &Fields<'_>) -> Result<Architecture> {
    let bias = fields.flag("attention_bias", false)?;
    let base = fields.rotary_family(&Defaults { head_dim: Some(128), ..Defaults::default() })?;
    let sliding = fields.qwen_sliding(base.depth())?;
    let base = with_windows(base, |index| sliding.get(index).copied().flatten());
    Ok(Architecture { qkv_bias: bias, output_bias: bias, qk_norm: Some(QkNorm::PerHead), ..base })
}

fn gemma(fields: &Fields<'_>) -> Result<Architecture> {
    let bias = fields.flag("attention_bias", false)?;
    let defaults = Defaults {
        head_dim: Some(256),
        tied: true,
        activation: &["hidden_act"],
        activation_default: "gelu_pytorch_tanh",
        ..Defaults::default()
    };
    let base = fields.rotary_family(&defaults)?;
    Ok(Architecture {
        norm: NormKind::Rms { unit_offset: true },
        embedding_scale: Some((base.hidden_size as f64).sqrt()),
        qkv_bias: bias,
        output_bias: bias,
        ..base
    })
}

fn gemma2(fields: &Fields<'_>) -> Result<Architecture> {
    let activation = fields.activation(&["hidden_activation"], "gelu_pytorch_tanh")?;
    let base = Architecture { activation, ..gemma(fields)? };
    let window = fields.size_or("sliding_window", 4096)?;
    let sliding =
        fields.layer_types(base.depth())?.unwrap_or_else(|| (0..base.depth()).map(|i| i % 2 == 0).collect());
    let scalar = fields.positive_or("query_pre_attn_scalar", 256.0)?;
    let base = with_windows(base, |index| sliding.get(index).copied().unwrap_or_default().then_some(window));
    Ok(Architecture {
        norm_placement: NormPlacement::Sandwich,
        attention_scale: scalar.powf(-0.5),
        attention_softcap: fields.optional_positive_or("attn_logit_softcapping", Some(50.0))?,
        logit_softcap: fields.optional_positive_or("final_logit_softcapping", Some(30.0))?,
        ..base
    })
}

fn gemma3(fields: &Fields<'_>) -> Result<Architecture> {
    let base = gemma2(fields)?;
    let window = fields.size_or("sliding_window", 4096)?;
    let pattern = match fields.optional_size("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => fields.size_or("_sliding_window_pattern", 6)?,
    };
    let regular = || (0..base.depth()).map(|index| !(index + 1).is_multiple_of(pattern)).collect();
    let sliding = fields.layer_types(base.depth())?.unwrap_or_else(regular);
    let global = fields.rope(base.head_dim, Some(FULL), 1_000_000.0)?;
    let local = match fields.get("rope_parameters") {
        Some(parameters) if parameters.get(SLIDING).is_none() => {
            let reason = format!("has no `{SLIDING}`, expected one for each kind of attention");
            return Err(Error::config("rope_parameters", reason));
        }
        Some(_) => fields.rope(base.head_dim, Some(SLIDING), 10_000.0)?,
        None => RopeSpec {
            theta: fields.positive_or("rope_local_base_freq", 10_000.0)?,
            scaling: RopeScaling::Default,
            ..global
        },
    };
    let blocks = sliding.iter().map(|&slides| BlockSpec {
        window: slides.then_some(window),
        rope: if slides { local } else { global },
    });
    Ok(Architecture {
        blocks: blocks.collect(),
        qk_norm: Some(QkNorm::PerHead),
        attention_softcap: fields.optional_positive_or("attn_logit_softcapping", None)?,
        logit_softcap: fields.optional_positive_or("final_logit_softcapping", None)?,
        ..base
    })
}

fn phi3(fields: &Fields<'_>) -> Result<Architecture> {
    let window = fields.optional_size("sliding_window")?;
    let defaults = Defaults { norm_eps: 1e-5, ..Defaults::default() };
    let base = fields.rotary_family(&defaults)?;
    Ok(with_windows(base, |_| window))
}

fn olmo2(fields: &Fields<'_>) -> Result<Architecture> {
    let bias = fields.flag("attention_bias", false)?;
    let base = fields.rotary_family(&Defaults { norm_eps: 1e-5, ..Defaults::default() })?;
    Ok(Architecture {
        norm_placement: NormPlacement::Post,
        qk_norm: Some(QkNorm::Full),
        qkv_bias: bias,
        output_bias: bias,
        ..base
    })
}

fn gpt2(fields: &Fields<'_>) -> Result<Architecture> {
    let expected = [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ];
    for (field, wanted) in expected {
        if fields.flag(field, wanted)? != wanted {
            return Err(Error::config(field, format!("{} is not supported, expected {wanted}", !wanted)));
        }
    }
    let (hidden, heads) = (fields.size("n_embd")?, fields.size("n_head")?);
    let depth = fields.depth("n_layer")?;
    let head_dim = divided("n_embd", hidden, "n_head", heads)?;
    let unused = RopeSpec { theta: 10_000.0, rotary_dim: 0, scaling: RopeScaling::Default };
    Ok(Architecture {
        model_type: "gpt2".into(),
        vocab_size: fields.size("vocab_size")?,
        hidden_size: hidden,
        intermediate_size: fields.optional_size("n_inner")?.unwrap_or(4 * hidden),
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        max_position_embeddings: fields.size("n_positions")?,
        norm: NormKind::Layer,
        norm_eps: fields.positive_or("layer_norm_epsilon", 1e-5)?,
        norm_placement: NormPlacement::Pre,
        qk_norm: None,
        mlp: MlpKind::Plain,
        activation: fields.activation(&["activation_function"], "gelu_new")?,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        positions: Positions::Learned,
        embedding_scale: None,
        attention_scale: (head_dim as f64).powf(-0.5),
        attention_softcap: None,
        logit_softcap: None,
        tied: fields.flag("tie_word_embeddings", true)?,
        blocks: vec![BlockSpec { window: None, rope: unused }; depth],
        fold: FoldMap::default(),
    })
}

fn with_windows(mut arch: Architecture, window: impl Fn(usize) -> Option<usize>) -> Architecture {
    for (index, block) in arch.blocks.iter_mut().enumerate() {
        block.window = window(index);
    }
    arch
}

/// What a family assumes where its config is silent.
struct Defaults {
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    norm_eps: f64,
    tied: bool,
    activation: &'static [&'static str],
    activation_default: &'static str,
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
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn of(config: &'a Value) -> Result<Self> {
        config.as_object().map(Fields).ok_or_else(|| Error::config("", "expected a json object of fields"))
    }

    /// The field, where it is there and not null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn has(&self, field: &str) -> bool {
        self.0.contains_key(field)
    }

    fn string(&self, field: &str) -> Result<&'a str> {
        let value = self.get(field).ok_or_else(|| Error::config(field, "missing"))?;
        value.as_str().ok_or_else(|| Error::config(field, format!("{value}, expected a string")))
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Error::config(field, format!("{value}, expected true or false")))
    }

    fn size(&self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| Error::config(field, "missing"))
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(field)?.unwrap_or(default))
    }

    fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|size| (1..=LARGEST_SIZE).contains(size)) {
            Some(size) => Ok(Some(size)),
            None => {
                Err(Error::config(field, format!("{value}, expected an integer from 1 to {LARGEST_SIZE}")))
            }
        }
    }

    fn depth(&self, field: &str) -> Result<usize> {
        match self.size(field)? {
            depth if depth <= MOST_BLOCKS => Ok(depth),
            depth => Err(Error::config(field, format!("{depth}, expected at most {MOST_BLOCKS}"))),
        }
    }

    fn optional_positive_or(&self, field: &str, default: Option<f64>) -> Result<Option<f64>> {
        // An explicit null switches the feature off; only silence means the default.
        if !self.has(field) {
            return Ok(default);
        }
        self.get(field).map(|value| positive(field, value)).transpose()
    }

    fn positive_or(&self, field: &str, default: f64) -> Result<f64> {
        self.get(field).map_or(Ok(default), |value| positive(field, value))
    }

    fn activation(&self, names: &[&str], default: &str) -> Result<Activation> {
        let named = names.iter().find_map(|&field| Some((field, self.get(field)?)));
        let Some((field, value)) = named else { return Ok(activation(default).unwrap_or(Activation::Silu)) };
        value.as_str().and_then(activation).ok_or_else(|| {
            let known = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu";
            Error::config(field, format!("{value} is not supported, expected one of {known}"))
        })
    }

    /// What changes the computation in ways that no family here knows.
    fn refuse_unsupported(&self) -> Result<()> {
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
    fn layer_types(&self, depth: usize) -> Result<Option<Vec<bool>>> {
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
    fn qwen_sliding(&self, depth: usize) -> Result<Vec<Option<usize>>> {
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
    fn rope(&self, head_dim: usize, kind: Option<&str>, default_theta: f64) -> Result<RopeSpec> {
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
    fn rotary_family(&self, defaults: &Defaults) -> Result<Architecture> {
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

fn positive(field: &str, value: &Value) -> Result<f64> {
    let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| Error::config(field, format!("{value}, expected a positive number")))
}

fn divided(whole: &str, a: usize, parts: &str, b: usize) -> Result<usize> {
    if a.is_multiple_of(b) {
        return Ok(a / b);
    }
    Err(Error::config(parts, format!("{b} does not divide {whole} {a}")))
}

fn activation(name: &str) -> Option<Activation> {
    match name {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_tanh" => Some(Activation::GeluTanh),
        "gelu" => Some(Activation::GeluErf),
        "relu" => Some(Activation::Relu),
        _ => None,
    }
}

/// What no single field can tell.
fn check(arch: &Architecture) -> Result<()> {
    let (heads, kv_heads) = (arch.num_attention_heads, arch.num_key_value_heads);
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("{kv_heads} does not divide num_attention_heads {heads}");
        return Err(Error::config("num_key_value_heads", reason));
    }
    if heads.checked_mul(arch.head_dim).is_none_or(|width| width > LARGEST_SIZE) {
        let reason = format!("{heads} heads of {} are wider than {LARGEST_SIZE}", arch.head_dim);
        return Err(Error::config("head_dim", reason));
    }
    let count = |n: u64, shape: &[usize]| {
        n.checked_add(shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64))?)
    };
    let params = arch.params();
    if params.iter().try_fold(0u64, |n, (_, shape)| count(n, shape)).is_none_or(|n| n > MOST_PARAMETERS) {
        let reason = format!(
            "{} blocks of {} are more than {MOST_PARAMETERS} parameters",
            arch.depth(),
            arch.hidden_size
        );
        return Err(Error::config("hidden_size", reason));
    }
    Ok(())
}
