//! Models of the hub, from a server on this machine: fetched, broken off, resumed, refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/hub_server.rs"]
mod hub_server;
mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use foldgpt::candle::{DType, Device};
use foldgpt::{Checkpoint, Error, HubOptions, Observer, SaveOptions};
use hub_server::{Asked, COMMIT, Fault, MODEL, Server, State, files_of, sha256};
use support::{fixture, input_ids, load, open};

const WEIGHTS: &str = "model.safetensors";

/// A hub with the fixture `llama`, the server of its large files, and an empty cache.
struct World {
    hub: Server,
    cdn: Server,
    cache: tempfile::TempDir,
    options: HubOptions,
}

fn tiny() -> State {
    let mut files = files_of(&fixture("llama"));
    let stories = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        files.insert(name.to_owned(), std::fs::read(stories.join(name)).unwrap());
    }
    for name in ["README.md", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", ".gitattributes"] {
        files.insert(name.to_owned(), b"not asked for".to_vec());
    }
    State { files, commit: COMMIT.to_owned(), ..State::default() }
}

fn world(mut state: State) -> World {
    let cdn = Server::start(State { files: state.files.clone(), ..State::default() });
    state.cdn = cdn.url();
    let hub = Server::start(state);
    let cache = tempfile::tempdir().unwrap();
    let mut options = HubOptions::new(cache.path());
    (options.endpoint, options.retries) = (hub.url(), 0);
    World { hub, cdn, cache, options }
}

impl World {
    fn open(&self) -> foldgpt::Result<Checkpoint> {
        Checkpoint::open_hub(MODEL, &self.options, &mut ())
    }

    fn error(&self) -> String {
        self.open().unwrap_err().to_string()
    }

    fn offline(&self) -> foldgpt::Result<Checkpoint> {
        let mut options = self.options.clone();
        options.offline = true;
        Checkpoint::open_hub(MODEL, &options, &mut ())
    }

    /// The checkpoint has the bytes of the server and computes what the fixture does.
    fn check(&self, checkpoint: &Checkpoint) {
        let fetched = std::fs::read(checkpoint.location().join(WEIGHTS)).unwrap();
        assert_eq!(sha256(&fetched), sha256(&self.hub.state().files[WEIGHTS]));
        check_logits(checkpoint);
    }

    /// The parts in the cache.
    fn parts(&self) -> Vec<PathBuf> {
        let blobs = std::fs::read_dir(self.cache.path().join("models--org--tiny/blobs")).unwrap();
        let paths = blobs.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|end| end == "part")).collect()
    }
}

fn check_logits(checkpoint: &Checkpoint) {
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let logits = |decoder: &foldgpt::Decoder| {
        let logits = decoder.forward(&input_ids("llama")).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(logits(&decoder), logits(&load("llama")));
}

fn status(error: &Error) -> Option<u16> {
    match error {
        Error::Hub { status, .. } => *status,
        other => panic!("{other}"),
    }
}

/// Keeps what it is told, and stops the second stage of bytes at some point.
#[derive(Debug, Default)]
struct Watch {
    stages: Vec<(u64, u64)>,
    stop_at: Option<u64>,
}

impl Observer for Watch {
    fn started(&mut self, stage: &'static str, total: u64) {
        assert_eq!(stage, "fetch");
        self.stages.push((0, total));
    }

    fn advanced(&mut self, _: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        let last = self.stages.last_mut().unwrap();
        assert_eq!(total, last.1);
        assert!(done <= total);
        last.0 = done;
        match self.stop_at {
            Some(stop) if self.stages.len() > 2 && done >= stop => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn a_fetched_model_is_the_local_one_and_nothing_else_is_fetched() {
    let world = world(tiny());
    let mut watch = Watch::default();
    let checkpoint = Checkpoint::open_hub(MODEL, &world.options, &mut watch).unwrap();
    world.check(&checkpoint);
    checkpoint.tokenizer().unwrap();

    let size = |name: &str| world.hub.state().files[name].len() as u64;
    let (config, weights) = (size("config.json"), size(WEIGHTS));
    let rest = weights + size("tokenizer.json") + size("tokenizer_config.json");
    assert_eq!(watch.stages, [(0, 0), (config, config), (rest, rest)]);
    for unwanted in ["README", "bin", "gguf", "onnx", "gitattributes", "expected"] {
        assert!(world.hub.asked().iter().all(|asked| !asked.path.contains(unwanted)), "{unwanted}");
    }
    assert_eq!(world.cdn.asked().len(), 1);

    // Opened again, the hub is asked what `main` is; of a commit, nothing.
    world.check(&world.open().unwrap());
    let asked = world.hub.asked();
    assert!(asked.len() == 1 && asked[0].path.starts_with("/api/models/org/tiny/revision/main"), "{asked:?}");
    let at_commit = format!("{MODEL}@{COMMIT}");
    world.check(&Checkpoint::open_hub(&at_commit, &world.options, &mut ()).unwrap());
    assert!(world.hub.asked().is_empty() && world.cdn.asked().is_empty());
}

#[test]
fn the_cache_serves_without_the_hub() {
    let mut world = world(tiny());
    let error = world.offline().unwrap_err();
    assert!(status(&error).is_none() && error.to_string().contains("offline"), "{error}");
    world.open().unwrap();
    world.hub.asked();
    world.check(&world.offline().unwrap());
    assert!(world.hub.asked().is_empty());

    // Out of order, and then gone.
    world.hub.state().faults = vec![("/api/", Fault::Status(503, ""), 1)];
    world.check(&world.open().unwrap());
    let address = world.hub.url();
    let files = world.hub.state().files.clone();
    world.hub = Server::start(State { files, ..State::default() });
    world.options.endpoint = address;
    world.check(&world.open().unwrap());
    world.check(&world.offline().unwrap());
    world.options.revision = Some("v2".to_owned());
    let error = world.open().unwrap_err();
    assert!(status(&error).is_none());
    let text = error.to_string();
    assert!(text.contains("`v2`") && text.contains("cache at") && text.contains("cannot fetch"), "{text}");
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let mut world = world(tiny());
    world.options.retries = 1;
    // Each break brings bytes, and so the count of retries begins anew.
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(100_000), 2)];
    world.check(&world.open().unwrap());
    let ranges: Vec<_> = world.cdn.asked().into_iter().map(|asked| asked.range).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned()), Some("bytes=200000-".to_owned())]);
    assert!(world.parts().is_empty());
}

#[test]
fn a_transfer_that_stays_broken_is_resumed_by_the_next_process() {
    let world = world(tiny());
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(100_000), 1)];
    let error = world.error();
    for part in [WEIGHTS, MODEL, "`main`", "100000 of 337480", "what has arrived is kept"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = world.offline().unwrap_err().to_string();
    assert!(error.contains("nothing of it is there"), "{error}");
    assert_eq!(std::fs::metadata(&world.parts()[0]).unwrap().len(), 100_000);

    world.cdn.asked();
    world.check(&world.open().unwrap());
    assert_eq!(world.cdn.asked()[0].range.as_deref(), Some("bytes=100000-"));
}

#[test]
fn a_server_without_ranges_sends_the_file_anew() {
    let world = world(tiny());
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(100_000), 1), ("/cdn/", Fault::NoRanges, 1)];
    world.error();
    world.check(&world.open().unwrap());
    assert_eq!(world.cdn.asked().len(), 2);
}

#[test]
fn parts_that_are_whole_too_long_or_damaged_do_no_harm() {
    let world = world(tiny());
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(100_000), 1)];
    world.error();
    let (part, bytes) = (world.parts().remove(0), world.hub.state().files[WEIGHTS].clone());

    let mut damaged = bytes[..100_000].to_vec();
    damaged[50_000] ^= 1;
    std::fs::write(&part, damaged).unwrap();
    let error = world.error();
    assert!(error.contains("hash to") && error.contains(&sha256(&bytes)), "{error}");
    assert!(world.parts().is_empty() && world.offline().is_err());

    std::fs::write(&part, vec![0; bytes.len() + 1]).unwrap();
    world.check(&world.open().unwrap());

    // Killed between the last byte and the name: no request is needed for it.
    let blob = part.with_extension("");
    std::fs::rename(&blob, &part).unwrap();
    world.cdn.asked();
    world.check(&world.open().unwrap());
    assert!(world.cdn.asked().is_empty() && blob.exists());
}

#[test]
fn a_cancelled_transfer_is_resumed() {
    let world = world(tiny());
    let mut watch = Watch { stop_at: Some(150_000), ..Watch::default() };
    let error = Checkpoint::open_hub(MODEL, &world.options, &mut watch).unwrap_err();
    assert!(matches!(error, Error::Cancelled { stage: "fetch" }), "{error}");
    assert!(world.offline().is_err());
    let kept = std::fs::metadata(&world.parts()[0]).unwrap().len();
    assert!(kept > 0);
    world.cdn.asked();
    world.check(&world.open().unwrap());
    assert_eq!(world.cdn.asked()[0].range, Some(format!("bytes={kept}-")));
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let mut world = world(tiny());
    let error = Checkpoint::open_hub("org/other", &world.options, &mut ()).unwrap_err();
    assert_eq!(status(&error), Some(404));
    assert!(error.to_string().contains("org/other") && error.to_string().contains("`main`"), "{error}");

    world.options.revision = Some("v2".to_owned());
    let error = world.open().unwrap_err();
    assert_eq!(status(&error), Some(404));
    assert!(error.to_string().contains("has the model, but not revision `v2`"), "{error}");

    world.options.revision = None;
    let error = Checkpoint::open_hub("org/tiny@refs/pr/1", &world.options, &mut ()).unwrap_err();
    assert!(error.to_string().contains("`refs/pr/1`"), "{error}");
    world.hub.state().revisions.push("refs/pr/1".to_owned());
    world.check(&Checkpoint::open_hub("org/tiny@refs/pr/1", &world.options, &mut ()).unwrap());

    for name in ["config.json", "tokenizer.json", WEIGHTS] {
        let mut state = tiny();
        state.files.remove(name);
        let error = self::world(state).error();
        assert!(error.contains(&format!("`{name}`")) && error.contains(MODEL), "{error}");
    }
}

/// The fixture's files, its weights in several.
fn sharded() -> State {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("sharded");
    let mut options = SaveOptions::default();
    options.max_shard_bytes = 100_000;
    open("llama").save(&load("llama"), None, &directory, &options, &mut ()).unwrap();
    let mut state = tiny();
    state.files.remove(WEIGHTS);
    state.files.extend(files_of(&directory));
    state
}

#[test]
fn shards_are_fetched_by_their_index() {
    let world = world(sharded());
    let shards: Vec<String> =
        world.hub.state().files.keys().filter(|name| name.contains("-of-")).cloned().collect();
    assert!(shards.len() > 2);
    world.cdn.state().faults = vec![("/cdn/", Fault::Status(404, "EntryNotFound"), 1)];
    let error = world.open().unwrap_err();
    assert_eq!(status(&error), Some(404));
    assert!(error.to_string().contains(&format!("`{}` of revision `main`", shards[0])), "{error}");
    assert!(world.offline().is_err());

    // The second shard breaks: the first one is not fetched again.
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(9000), 2)];
    world.cdn.state().faults.insert(0, ("/cdn/", Fault::Unannounced(usize::MAX), 1));
    world.error();
    assert!(world.offline().is_err());
    world.cdn.state().faults.clear();
    world.cdn.asked();
    check_logits(&world.open().unwrap());
    let asked = world.cdn.asked();
    assert_eq!(asked.len(), shards.len() - 1);
    assert_eq!(asked[0].range.as_deref(), Some("bytes=9000-"));

    let mut state = sharded();
    state.files.remove(&shards[1]);
    let error = self::world(state).error();
    assert!(error.contains(&format!("has no `{}`", shards[1])), "{error}");
}

#[test]
fn the_token_reaches_the_hub_and_nobody_else() {
    let mut state = tiny();
    state.token = Some("secret".to_owned());
    let mut world = world(state);
    let error = world.open().unwrap_err();
    assert_eq!(status(&error), Some(401));
    let text = error.to_string();
    assert!(
        text.contains("none was found") && text.contains("HF_TOKEN") && text.contains("hf auth login"),
        "{text}"
    );
    assert!(world.hub.asked().iter().all(|asked| asked.authorization.is_none()));

    world.options.token = Some("wrong".to_owned());
    let error = world.open().unwrap_err();
    assert_eq!(status(&error), Some(401));
    let text = error.to_string();
    assert!(text.contains("the one given is not enough") && !text.contains("wrong"), "{text}");

    world.options.token = Some("secret".to_owned());
    world.hub.state().faults = vec![("resolve", Fault::Status(403, "GatedRepo"), 1)];
    let error = world.open().unwrap_err();
    assert_eq!(status(&error), Some(403));
    assert!(error.to_string().contains("`config.json`") && error.to_string().contains("gated"), "{error}");

    for bare_list in [false, true] {
        world.hub.asked();
        world.cdn.asked();
        world.hub.state().bare_list = bare_list;
        let cache = tempfile::tempdir().unwrap();
        world.options.cache_dir = cache.path().to_owned();
        world.check(&world.open().unwrap());
        let held = |asked: &Asked| asked.authorization.as_deref() == Some("Bearer secret");
        let (hub, cdn) = (world.hub.asked(), world.cdn.asked());
        assert!(hub.len() > 6 && hub.iter().all(held), "{hub:?}");
        assert!(!cdn.is_empty() && cdn.iter().all(|asked| asked.authorization.is_none()), "{cdn:?}");
    }
    assert!(!format!("{:?}", world.options).contains("secret"));
}

#[test]
fn a_list_of_bare_names_is_enough() {
    let mut state = tiny();
    state.bare_list = true;
    let world = world(state);
    world.check(&world.open().unwrap());
    let probes = world.cdn.asked();
    assert_eq!(probes[0].range.as_deref(), Some("bytes=0-0"));
    assert_eq!(probes.len(), 2);
}

#[test]
fn a_server_that_lies_is_found_out() {
    let garbage = || Fault::Body(b"<html>".to_vec());
    let list = |sha: &str| Fault::Body(format!(r#"{{"sha": "{sha}", "siblings": []}}"#).into_bytes());
    let zeros = || Fault::Body(vec![0; tiny().files[WEIGHTS].len()]);
    let longer = || Fault::Body(vec![0; tiny().files[WEIGHTS].len() + 1]);
    let cases = [
        ("/api/models", garbage(), "the list of files is not one"),
        ("/api/models", list("../../other"), "`../../other` is no commit"),
        ("/api/models", list(""), "`` is no commit"),
        ("/api/models", Fault::RedirectTo("ftp://example.invalid/"), "a redirect to `ftp:"),
        ("/resolve/", Fault::Status(302, ""), "a redirect to nowhere"),
        ("/cdn/", zeros(), "hash to"),
        ("/cdn/", longer(), "337481 bytes are announced, expected 337480"),
        ("/resolve-cache/", garbage(), "6 bytes are announced"),
    ];
    for (place, fault, expected) in cases {
        let world = world(tiny());
        let server = if place == "/cdn/" { &world.cdn } else { &world.hub };
        server.state().faults = vec![(place, fault, 1)];
        let error = world.open().unwrap_err();
        assert!(status(&error).is_none() && error.to_string().contains(expected), "{expected}: {error}");
        assert!(world.offline().is_err(), "{expected}");
        // Nothing of the lie is left.
        world.check(&world.open().unwrap());
    }
}

#[test]
fn lies_about_parts_and_loops_are_found_out() {
    let world = world(tiny());
    world.cdn.state().faults = vec![("/cdn/", Fault::Break(100_000), 1), ("/cdn/", Fault::WrongRange, 1)];
    world.error();
    let error = world.error();
    assert!(error.contains("byte 1 of 3") && error.contains("byte 100000 of 337480"), "{error}");
    // No length is announced: only the hub's list tells that the end comes early.
    world.cdn.state().faults = vec![("/cdn/", Fault::Unannounced(1000), 1)];
    let error = world.error();
    assert!(error.contains("broken off after 101000 of 337480"), "{error}");
    world.hub.state().faults = vec![("/api/", Fault::RedirectTo("/api/again"), 99)];
    let error = world.error();
    assert!(error.contains("more than 10 redirects"), "{error}");
    assert!(world.offline().is_err());
}

#[test]
fn a_branch_that_moves_is_followed_and_files_it_shares_are_not_fetched_again() {
    let world = world(tiny());
    let before = world.open().unwrap();
    {
        let mut hub = world.hub.state();
        hub.commit = COMMIT.replace('0', "f");
        hub.files.insert("generation_config.json".to_owned(), b"{}".to_vec());
    }
    world.cdn.asked();
    let after = world.open().unwrap();
    world.check(&after);
    assert_ne!(before.location(), after.location());
    assert!(after.location().join("generation_config.json").exists());
    assert!(world.cdn.asked().is_empty());
    assert_eq!(world.offline().unwrap().location(), after.location());
}

#[test]
fn a_model_that_cannot_be_loaded_is_refused_before_its_weights() {
    let mut state = tiny();
    state.files.insert("config.json".to_owned(), br#"{"model_type": "bert"}"#.to_vec());
    let world = world(state);
    let error = world.error();
    assert!(error.contains("config.json") && error.contains("`bert`"), "{error}");
    assert!(world.cdn.asked().is_empty());
}

#[test]
fn compact_checkpoints_are_fetched_too() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("compact");
    let (_, plan) = support::kinds("llama").remove(0);
    let folded = support::folded("llama", &plan);
    let options = foldgpt::Format::Compact.into();
    open("llama").save(&folded, Some(&plan), &directory, &options, &mut ()).unwrap();
    let mut state = tiny();
    state.files.extend(files_of(&directory));
    let world = world(state);
    let checkpoint = world.open().unwrap();
    assert_eq!(checkpoint.architecture(), folded.architecture());
    assert!(!checkpoint.location().join(WEIGHTS).exists(), "not its weights");
    assert!(world.offline().is_ok());
}

#[test]
fn an_endpoint_that_is_no_address_is_refused() {
    let mut options = HubOptions::new(Path::new("unused"));
    for endpoint in ["", "huggingface.co", "ftp://hub", "http://"] {
        endpoint.clone_into(&mut options.endpoint);
        let error = Checkpoint::open_hub(MODEL, &options, &mut ()).unwrap_err();
        assert!(matches!(error, Error::Argument { name: "endpoint", .. }), "{error}");
    }
    assert!(!Path::new("unused").exists());
}
