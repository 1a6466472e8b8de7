//! Flags of the examples: what would be ignored is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/cli/mod.rs"]
mod cli;

use clap::Parser;
use clap::error::ErrorKind;
use foldgpt::plan::{Donor, Ranks, ResidualStart, ScaleStart};

#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    target: cli::target::TargetArgs,
    #[command(flatten)]
    sharing: cli::target::SharingArgs,
}

fn parse(flags: &str) -> Result<Args, clap::Error> {
    Args::try_parse_from(std::iter::once("compress").chain(flags.split_whitespace()))
}

#[test]
fn flags_of_sharing_need_what_they_are_about() {
    for flags in [
        "--remove 0.2",
        "--group-size 2 --donor best --no-norms --scales --rank 8 --start svd",
        "--budget-params 0.6 --remove 0.1 --donor first",
        "--budget-params 0.6 --search",
        "--budget-params 0.6 --groups budget --donor best --scales --rank 8 --start svd",
    ] {
        assert!(parse(flags).is_ok(), "{flags}: {:?}", parse(flags));
    }
    for (flags, kind) in [
        ("--remove 0.2 --donor first", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --no-norms", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --no-norms", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --scales", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --rank 8", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --start svd", ErrorKind::MissingRequiredArgument),
        ("--group-size 2 --start svd", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --scales", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --rank 8", ErrorKind::MissingRequiredArgument),
        ("--groups budget", ErrorKind::MissingRequiredArgument),
        ("--group-size 2 --budget-params 0.6", ErrorKind::ArgumentConflict),
        ("--group-size 2 --groups budget", ErrorKind::ArgumentConflict),
        ("--group-size 2 --search", ErrorKind::ArgumentConflict),
        ("--budget-params 0.6 --groups budget --search", ErrorKind::ArgumentConflict),
        ("--remove 0.2 --search", ErrorKind::MissingRequiredArgument),
    ] {
        assert_eq!(parse(flags).unwrap_err().kind(), kind, "{flags}");
    }
}

#[test]
fn flags_of_sharing_say_what_is_shared() {
    let of = |flags: &str| parse(flags).unwrap().sharing.share(|| Ok(1000)).unwrap().unwrap();
    let share = of("--group-size 2 --donor best --scales --rank 8 --start svd");
    assert_eq!((share.donor, share.own.scales), (Donor::Best, Some(ScaleStart::LeastSquares)));
    assert!(share.own.norms && !of("--group-size 2 --no-norms").own.norms);
    let residual = share.own.residual.unwrap();
    assert_eq!((residual.ranks, residual.start), (Ranks::Uniform(8), ResidualStart::Svd));
    assert!(parse("--remove 0.2").unwrap().sharing.share(|| Ok(1000)).unwrap().is_none());
    assert_eq!(
        parse("--budget-params 0.6 --donor first").unwrap().sharing.mix().unwrap().donor,
        Donor::First
    );
}

/// The signal of Ctrl-C, sent to this process while a model is copied.
#[cfg(unix)]
#[test]
fn an_interrupt_cancels_what_runs_and_leaves_nothing() {
    use foldgpt::{Checkpoint, Error, Observer, SaveOptions};
    use std::ops::ControlFlow;
    use std::time::{Duration, Instant};

    /// Sends the signal when copying has begun, and waits until it has arrived.
    struct Interrupted(cli::Bars);
    impl Observer for Interrupted {
        fn started(&mut self, stage: &'static str, total: u64) {
            self.0.started(stage, total);
        }
        fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
            // Of the shell's own, since not every system has a program for it.
            let kill = format!("kill -s INT {}", std::process::id());
            assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
            let start = Instant::now();
            while self.0.advanced(stage, done, total).is_continue() {
                assert!(start.elapsed() < Duration::from_mins(1), "the signal has not arrived");
                std::thread::sleep(Duration::from_millis(1));
            }
            ControlFlow::Break(())
        }
        fn finished(&mut self, stage: &'static str) {
            self.0.finished(stage);
        }
    }

    let checkpoint = Checkpoint::open("examples/tiny-stories").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut observer = Interrupted(cli::Bars::default());
    let out = scratch.path().join("out");
    let result = checkpoint.save_blocks(&[0], None, &out, &SaveOptions::default(), &mut observer);
    assert!(matches!(result, Err(Error::Cancelled { stage: "save" })), "{result:?}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}
