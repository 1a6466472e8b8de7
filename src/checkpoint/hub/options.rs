//! Where the hub is, where its cache lies, and who asks.

use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";
const RETRIES: u32 = 5;

/// How a checkpoint is opened from the Hugging Face hub.
///
/// ```no_run
/// use foldgpt::{Checkpoint, HubOptions};
///
/// let mut options = HubOptions::from_env()?;
/// options.revision = Some("v1.0".to_owned());
/// let checkpoint = Checkpoint::open_hub("org/name", &options, &mut ())?;
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HubOptions {
    /// A branch, a tag or a commit; none is the one that the id names (`org/name@revision`), else `main`.
    pub revision: Option<String>,
    /// What private and gated models ask for. It is sent to the endpoint, and never to where that redirects.
    pub token: Option<String>,
    /// The address of the hub, `http://…` or `https://…`.
    pub endpoint: String,
    /// The directory of the cache, in the layout that `huggingface_hub` and other programs share.
    pub cache_dir: PathBuf,
    /// Makes no request: what the cache does not hold is an error.
    pub offline: bool,
    /// How often a request is made again when nobody answers or a transfer breaks, each after a longer wait. What
    /// has arrived of a file is kept in any case; bytes that arrive start the count anew.
    pub retries: u32,
}

impl HubOptions {
    /// The public hub without a token, over a cache of its own, whatever the environment says.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            revision: None,
            token: None,
            endpoint: ENDPOINT.to_owned(),
            cache_dir: cache_dir.into(),
            offline: false,
            retries: RETRIES,
        }
    }

    /// What the environment says, by the variables of `huggingface_hub`: the cache is `HF_HUB_CACHE`, else `hub` in
    /// `HF_HOME`, else `~/.cache/huggingface/hub`; the token is `HF_TOKEN`, else in the file `HF_TOKEN_PATH`, else in
    /// `token` in `HF_HOME`, where `hf auth login` saves it, and none with `HF_HUB_DISABLE_IMPLICIT_TOKEN`; the hub is
    /// `HF_ENDPOINT`; `HF_HUB_OFFLINE` forbids requests.
    ///
    /// # Errors
    /// No directory for the cache where there is neither a home directory nor a variable, or a file of the token that
    /// exists and cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| std::env::var_os(name), std::env::home_dir().as_deref())
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>, user_home: Option<&Path>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(|value| expanded(PathBuf::from(value), user_home));
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let on = |name: &str| {
            text(name).is_some_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };

        let default = || {
            let caches = path("XDG_CACHE_HOME").or_else(|| user_home.map(|home| home.join(".cache")));
            Some(caches?.join("huggingface"))
        };
        let home = path("HF_HOME").or_else(default);
        let Some(cache_dir) = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
        else {
            return Err(Error::argument(
                "HF_HOME",
                "not set",
                "a directory, since there is no home directory for the hub's cache",
            ));
        };

        let mut options = Self::new(cache_dir);
        options.endpoint = text("HF_ENDPOINT").unwrap_or(options.endpoint);
        options.offline = on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE");
        if !on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            let file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
            options.token = match text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")) {
                Some(token) => cleaned(&token),
                None => file.map(|file| saved_token(&file)).transpose()?.flatten(),
            };
        }
        Ok(options)
    }
}

impl fmt::Debug for HubOptions {
    /// Without the token: what is printed is kept in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .finish()
    }
}

fn cleaned(token: &str) -> Option<String> {
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn saved_token(file: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(cleaned(&text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", file)(error)),
    }
}

/// The path with a leading `~` replaced, which shells leave in some assignments.
fn expanded(path: PathBuf, user_home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user_home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)], home: &str) -> Result<HubOptions> {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        HubOptions::from_variables(&find, Some(home).filter(|home| !home.is_empty()).map(Path::new))
    }

    #[test]
    fn hub_variables_decide_as_documented() {
        let plain = options(&[("HF_HOME", "")], "/home/a").unwrap();
        assert_eq!(plain, HubOptions::new("/home/a/.cache/huggingface/hub"));
        let cache = |variables: &[(&str, &str)]| options(variables, "/home/a").unwrap().cache_dir;
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/h")]), Path::new("/home/a/h/hub"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), Path::new("/c"));
        let set = options(&[("HF_ENDPOINT", "http://m"), ("HF_HUB_OFFLINE", "yes")], "/home/a").unwrap();
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://m", true));
        assert!(!options(&[("HF_HUB_OFFLINE", "0")], "/home/a").unwrap().offline);
        assert!(options(&[], "").unwrap_err().to_string().contains("HF_HOME is not set"));
        assert!(options(&[("HF_HOME", "/h")], "").is_ok());
    }

    #[test]
    fn hub_tokens_are_found_and_never_shown() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| {
            let variables = [&[("HF_HOME", home)][..], more].concat();
            options(&variables, "").unwrap().token
        };
        assert_eq!(token(&[]), None);
        std::fs::write(root.path().join("token"), "saved\n").unwrap();
        std::fs::write(root.path().join("other"), " elsewhere ").unwrap();
        assert_eq!(token(&[]).unwrap(), "saved");
        let other = root.path().join("other");
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).unwrap(), "elsewhere");
        assert_eq!(token(&[("HF_TOKEN", "secret\n")]).unwrap(), "secret");
        assert_eq!(token(&[("HF_TOKEN", "secret"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let shown = format!("{:?}", options(&[("HF_TOKEN", "secret")], home).unwrap());
        assert!(!shown.contains("secret") && shown.contains("token: Some"), "{shown}");
    }
}
