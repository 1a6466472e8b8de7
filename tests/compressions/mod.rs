//! A small compression of the embedded model, and who watches it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use foldgpt::heal::{Budget, Losses};
use foldgpt::importance::Method;
use foldgpt::pipeline::Goal;
use foldgpt::{Compressor, Heal, Observer};
use tempfile::TempDir;

pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");
pub const SEQ_LEN: usize = 32;

/// A directory with a text in it.
pub fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for line in 0..60 {
        let (who, what) = (["Anna", "Ben", "Tom"][line % 3], ["kite", "ball", "dog", "hat"][line % 4]);
        writeln!(text, "{who} lost the red {what} near the old bridge, and day {line} was sad.").unwrap();
    }
    std::fs::write(directory.path().join("text.txt"), text).unwrap();
    directory
}

pub fn heal(steps: usize) -> Heal {
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.losses) = (Budget::Steps(steps), 2, Losses::tail());
    heal.save_every = 1;
    heal
}

pub fn compressor(directory: &Path, out: &str) -> Compressor {
    let text = directory.join("text.txt");
    let mut compressor = Compressor::new(MODEL, text, directory.join(out))
        .work(directory.join("work"))
        .method(Method::BlockInfluence)
        .target(Goal::Blocks(2));
    let windows = &mut compressor.recipe.windows;
    (windows.seq_len, windows.calibrate, windows.evaluate) = (SEQ_LEN, 3, 2);
    compressor
}

/// Notes the stages, and stops at the first step of one of them.
#[derive(Default)]
pub struct Watch {
    pub stages: Vec<&'static str>,
    pub stop: Option<(&'static str, u64)>,
}

impl Observer for Watch {
    fn started(&mut self, stage: &'static str, _: u64) {
        self.stages.push(stage);
    }

    fn advanced(&mut self, stage: &'static str, done: u64, _: u64) -> ControlFlow<()> {
        match self.stop {
            Some((name, at)) if name == stage && done >= at => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

impl Watch {
    pub fn compressing(&self) -> Vec<&'static str> {
        self.stages.iter().copied().filter(|stage| stage.starts_with("compress: ")).collect()
    }
}

pub fn weights(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}
