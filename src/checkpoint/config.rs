//! `config.json` to [`Architecture`]: one mapping for each family.

mod fields;

use serde_json::Value;

use super::compact;
use crate::error::{Error, Result};
use crate::model::{
    Architecture, BlockSpec, FoldMap, MlpKind, NormKind, NormPlacement, Positions, QkNorm, RopeScaling,
    RopeSpec,
};
use fields::{Defaults, Fields, divided};

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
