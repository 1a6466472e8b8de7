//! A healing that is killed at any time and goes on ends with the weights of one that never was: with a real process
//! and a real SIGKILL.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use foldgpt::candle::Tensor;
use foldgpt::heal::{Budget, Heal, Losses, ParamGroup, Teacher, Trainable};
use foldgpt::{Decoder, Windows};

use crate::support::load;

const STEPS: usize = 60;
const DIRECTORY: &str = "FOLDGPT_TEST_HEAL_DIRECTORY";

fn heal(directory: &Path) -> Decoder {
    let dense = load("llama");
    let cut = dense.with_blocks(&[0, 1, 3]).unwrap();
    let vocab = dense.architecture().vocab_size as u32;
    let window = |index: u32| (0..32).map(|i| (index * 5 + i * 3) % vocab).collect();
    let windows = Windows::from_ids((0..11).map(window).collect()).unwrap();
    let held_out = Windows::from_ids((90..92).map(window).collect()).unwrap();
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.losses) = (Budget::Steps(STEPS), 3, Losses::tail());
    heal.groups.push(ParamGroup::new(Trainable::LastBlocks(1), 1e-4).with_decay(0.1));
    (heal.evaluate_every, heal.save_every) = (7, 1);
    heal.state_file = Some(directory.join("state"));
    heal.log_file = Some(directory.join("log.jsonl"));
    let teacher = Some(Teacher::Model(&dense));
    heal.run(&cut, &windows, Some(&held_out), teacher, &mut ()).unwrap().decoder
}

fn bits(decoder: &Decoder) -> Vec<u32> {
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    decoder.tensors().flat_map(values).map(f32::to_bits).collect()
}

/// Runs in a process of its own, which is killed; alone it does nothing.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let bytes: Vec<u8> = bits(&heal(&directory)).into_iter().flat_map(u32::to_le_bytes).collect();
    std::fs::write(directory.join("weights.partial"), bytes).unwrap();
    std::fs::rename(directory.join("weights.partial"), directory.join("weights")).unwrap();
}

fn spawn(directory: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "killed::child"]).env(DIRECTORY, directory).stdout(Stdio::null());
    command.spawn().unwrap()
}

/// Lines of the log, whether the last one is whole or not.
fn logged(directory: &Path) -> usize {
    std::fs::read_to_string(directory.join("log.jsonl")).unwrap_or_default().lines().count()
}

#[test]
fn a_killed_run_ends_with_the_weights_of_an_uninterrupted_one() {
    let whole = tempfile::tempdir().unwrap();
    let expected = bits(&heal(whole.path()));

    let directory = tempfile::tempdir().unwrap();
    let mut kills = 0;
    for round in 0u64.. {
        let before = logged(directory.path());
        let mut child = spawn(directory.path());
        let start = Instant::now();
        // The log shrinks to the state before it grows. Some time into a step that was logged, at a moment of no
        // meaning, the process dies.
        let moved = |now: usize| now > before.saturating_sub(2) + 4;
        while kills < 6 && child.try_wait().unwrap().is_none() && !moved(logged(directory.path())) {
            assert!(start.elapsed() < Duration::from_mins(5), "the child does not get on");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(round * 3));
        if kills < 6 {
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.signal(), Some(9), "the child failed by itself");
        kills += 1;
    }
    assert!(kills >= 3, "the child was done after {kills} kills");
    let bytes = std::fs::read(directory.path().join("weights")).unwrap();
    let found: Vec<u32> =
        bytes.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect();
    assert!(found == expected, "the weights differ");
    let steps = |directory: &Path| {
        let text = std::fs::read_to_string(directory.join("log.jsonl")).unwrap();
        text.lines().filter(|line| line.contains("gradient_norm")).count()
    };
    assert_eq!((steps(whole.path()), steps(directory.path())), (STEPS, STEPS));
}
