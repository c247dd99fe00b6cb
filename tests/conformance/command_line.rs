//! What the program prints and how it exits.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use insta::{Settings, assert_snapshot};
use program::{Run, fake, program, run};
use rstest::rstest;

/// Hides what differs from run to run and from machine to machine: times, paths
/// and the last digits of errors, and the widths that depend on them.
fn with_filters(check: impl FnOnce()) {
    let mut settings = Settings::clone_current();
    settings.add_filter(r"\S*/ulysses-conformance", "ulysses-conformance");
    settings.add_filter(r"'\S*/python \S*/adapters/", "'python adapters/");
    settings.add_filter(r"\d+\.\d m?s\b", "TIME");
    settings.add_filter(r"-?\d\.\d+e[-+]?\d+", "NUMBER");
    settings.add_filter(r"\d+ of (\d+) numbers", "COUNT of $1 numbers");
    settings.add_filter(r"\b0\.\d\d\b", "RATIO");
    settings.add_filter(r"worst at batch .*?: ", "worst at PLACE: ");
    settings.add_filter(r" {2,}\|", " |");
    settings.add_filter(r"\| {2,}", "| ");
    settings.add_filter(r"-{5,}", "---");
    settings.bind(check);
}

fn text(run: &Run) -> String {
    format!(
        "exit code {}\n--- stdout\n{}--- stderr\n{}",
        run.code, run.stdout, run.stderr
    )
}

#[test]
fn help_says_what_there_is() {
    assert_snapshot!("help", run("--help").stdout);
    assert_snapshot!("help-run", run("run --help").stdout);
    assert_snapshot!("help-faults", run("faults --help").stdout);
}

#[test]
fn a_run_tells_of_each_case_and_ends_with_tables() {
    let run = run("run --world 1,2 --filter hq8-hkv2 --filter f32");
    assert_eq!(run.code, 0);
    with_filters(|| assert_snapshot!("run", text(&run)));
}

#[test]
fn a_failure_is_told_with_its_place_its_factor_and_the_command_that_repeats_it() {
    let run: Run = program()
        .args(["run", "--launch", &fake("gradient_over_world.py")])
        .args(["--filter", "p2-b3-s84-hq8-hkv4-d80-full-f32"])
        .output()
        .unwrap()
        .into();
    assert_eq!(run.code, 1);
    with_filters(|| assert_snapshot!("failure", text(&run)));
}

#[test]
fn a_case_of_ones_own_is_repeated_by_its_name() {
    let name = "attention/p2-b1-s10-hq2-hkv2-d4-causal-f64-peaked-seed99";
    let run = run(&format!("run --case {name}"));
    assert_eq!(run.code, 0);
    assert_eq!(run.named("exact"), [name]);
}

const SHOWN: &str = "attention/p2-b2-s13-hq2-hkv1-d8-causal-f32-gaussian-seed1";

#[test]
fn show_says_what_a_case_tests_and_what_mistakes_it_would_see() {
    assert_snapshot!("show", run(&format!("show {SHOWN}")).stdout);
}

#[test]
fn show_derives_how_far_one_number_may_be_off() {
    let shown = run(&format!("show {SHOWN} --element dk[1,4,0,3]"));
    with_filters(|| assert_snapshot!("show-element", text(&shown)));
    // lambda times the root, and the root of the sum of the parts' squares.
    let numbers = |marker: &str| -> Vec<f64> {
        let lines = shown.stdout.lines().filter(|line| line.contains(marker));
        let last = |line: &str| {
            let words = line.trim_end_matches(" |").rsplit([' ', '|']);
            words.filter_map(|word| word.parse().ok()).next().unwrap()
        };
        lines.map(last).collect()
    };
    let parts = ["answers, factors", "stores", "exponentials"].map(|part| numbers(part)[0]);
    let root = parts.iter().map(|part| part * part).sum::<f64>().sqrt();
    let said = numbers("root of the sum")[0];
    assert!((said / root - 1.0).abs() < 2e-3, "{said} is not {root}");
    let bound = format!("{:.2e}", 8.4030 * said);
    let digits = |text: &str| text.split('e').next().unwrap().to_owned();
    assert!(shown.stdout.contains(&digits(&bound)), "{bound}");
}

#[rstest]
#[case::no_tensor("dz[0,0,0,0]", "`dz` is no tensor of this case's answer")]
#[case::outside("dk[0,13,0,0]", "is not in a tensor dk [2, 13, 1, 8]")]
#[case::too_few("dk[0,1]", "is not in a tensor dk [2, 13, 1, 8]")]
#[case::no_place("dk", "--element is TENSOR[PLACE]")]
fn show_refuses_a_number_that_is_not_there(#[case] element: &str, #[case] reason: &str) {
    let shown = run(&format!("show {SHOWN} --element {element}"));
    assert_eq!(shown.code, 2);
    assert!(shown.stderr.contains(reason), "{}", shown.stderr);
}

#[test]
fn another_seed_asks_the_same_cases_with_other_values() {
    let list = |seed: &str| run(&format!("run --list --seed {seed}")).stdout;
    assert_eq!(list("0").replace("-seed0", "-seed5"), list("5"));
}

#[test]
fn the_list_is_the_catalogue() {
    assert_snapshot!("list", run("run --list").stdout);
}

#[rstest]
#[case::nothing_selected("run --filter no-such-case", 3, "no case is selected")]
#[case::no_name("run --case attention/p2", 2, "the batch is missing")]
#[case::no_implementation("run --implementation mine", 2, "invalid value 'mine'")]
#[case::no_program(
    "run --launch no-such-program",
    5,
    "there is no program `no-such-program`"
)]
#[case::empty_command("run --launch=", 5, "the command is empty")]
#[case::no_time("run --time-limit 0", 2, "a number of seconds above 0")]
#[case::two_ways("run --launch a --implementation reference", 2, "cannot be used with")]
#[case::seed_and_case(
    "run --seed 1 --case attention/p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0",
    2,
    "cannot be used with"
)]
fn what_makes_no_sense_is_refused_with_its_code(
    #[case] arguments: &str,
    #[case] code: i32,
    #[case] reason: &str,
) {
    let run = run(arguments);
    assert_eq!(run.code, code, "{}", run.stderr);
    assert!(run.stderr.contains(reason), "{}", run.stderr);
    assert_eq!(run.stdout, "");
}

#[test]
fn a_python_that_is_not_there_is_named_with_the_remedy() {
    let run: Run = program()
        .args(["run", "--implementation", "torch-plain"])
        .env("ULYSSES_PYTHON", "/nowhere/python")
        .output()
        .unwrap()
        .into();
    assert_eq!(run.code, 5);
    assert_eq!(
        run.stderr,
        "error: there is no program `/nowhere/python`: run `make setup`, or set ULYSSES_PYTHON\n"
    );
}

#[rstest]
#[case::sdpa("sdpa")]
#[case::eager("eager")]
fn the_reference_passes_around_either_kernel(#[case] kernel: &str) {
    let run = run(&format!("run --kernel {kernel} --filter d16 --world 1,4"));
    assert_eq!(run.code, 0, "{}", run.stdout);
    // Where a query sees one key alone, no kernel rounds otherwise.
    let is_mostly_exact = run.named("exact").len() > run.named("pass").len();
    assert_eq!(is_mostly_exact, kernel == "sdpa");
}
