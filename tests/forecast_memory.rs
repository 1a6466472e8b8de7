//! Whether a run takes about as much memory as was forecast. A test of its own: others would be in the same process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_os = "linux")]

mod compressions;

use compressions::{compressor, directory, heal};
use foldgpt::heal::Losses;

/// The most that this process has had in memory.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_healing_takes_about_what_was_forecast() {
    let directory = directory();
    let path = directory.path();
    let text = std::fs::read_to_string(path.join("text.txt")).unwrap();
    std::fs::write(path.join("text.txt"), text.repeat(8)).unwrap();
    // A small one, of which the process is the most, and one whose states and activations are more than that.
    for (seq_len, batch) in [(32, 1), (512, 4)] {
        let mut heal = heal(2);
        (heal.batch, heal.micro_batch, heal.losses) = (batch, batch, Losses::tail());
        let mut compressor = compressor(path, &format!("of-{seq_len}")).heal(heal);
        compressor.recipe.windows.seq_len = seq_len;
        let forecast = compressor.dry_run(&mut ()).unwrap();
        assert!(forecast.process_bytes.unwrap() > 1 << 20);
        assert!(forecast.to_string().contains("MB are the process itself"), "{forecast}");
        compressor.run(&mut ()).unwrap();
        let (told, taken) = (forecast.peak_bytes(), peak());
        assert!(told < 2 * taken && taken < 2 * told, "{seq_len}: {taken} bytes taken, {told} told");
    }
}
