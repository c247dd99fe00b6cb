//! What a run writes for programs, and what it keeps of a failure.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;
mod program;
mod spoiled;

use std::fs;
use std::path::Path;
use std::process::Command;

use fixtures::exchange::Session;
use fixtures::{Array, AttentionCase, Dtype, Inputs};
use program::{Run, fake, program, python};
use rstest::rstest;
use serde_json::{Value, json};
use spoiled::{How, Spoiled, summary};
use tempfile::TempDir;
use ulysses_conformance::diagnosis::{Diagnosis, Mistake};
use ulysses_conformance::judge::{Judgement, Verdict};
use ulysses_conformance::known::KnownFailures;
use ulysses_conformance::oracle::attention;
use ulysses_conformance::report::failure;

fn case(tokens: usize, parts: &str) -> String {
    format!("attention/p2-b1-s{tokens}-hq4-hkv4-d8-causal-f32-gaussian-seed0{parts}")
}

fn judged(adapter: &str, cases: &[String], more: &[&str]) -> Run {
    program()
        .args(["run", "--launch", &fake(adapter)])
        .args(cases.iter().flat_map(|case| ["--case", case]))
        .args(more)
        .env("ULYSSES_FAKE_SEQUENCE", "22")
        .output()
        .unwrap()
        .into()
}

fn violations(value: &Value) -> Vec<String> {
    let schemas = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let schema = fs::read_to_string(schemas.join("report.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors = validator.iter_errors(value);
    errors.map(|error| error.to_string()).collect()
}

#[test]
fn each_case_is_a_line_of_json_and_a_test_of_junit() {
    let folder = TempDir::new().unwrap();
    let [json, junit] = ["run.jsonl", "run.xml"].map(|name| folder.path().join(name));
    let cases = [case(20, ""), case(22, ""), case(24, "-window3")];
    let files = [
        "--json",
        json.to_str().unwrap(),
        "--junit",
        junit.to_str().unwrap(),
    ];
    let run = judged("crash.py", &cases, &files);
    assert_eq!(run.code, 1, "{}", run.stderr);

    let lines: Vec<Value> = fs::read_to_string(&json)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &lines {
        assert_eq!(violations(line), [""; 0], "{line}");
        assert_eq!(line["implementation"], "crash.py");
    }
    let all = |key: &str| {
        lines
            .iter()
            .map(|line| line[key].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(all("case"), cases);
    assert_eq!(all("verdict"), ["exact", "crash", "not claimed"]);
    assert_eq!(
        all("fault"),
        [json!(null), json!("implementation"), json!(null)]
    );
    let ratio = lines[0]["worst_ratio"].as_f64().unwrap();
    assert!((1e-6..1.0).contains(&ratio), "{ratio}");
    assert!(lines[0]["seconds"].as_f64().unwrap() > 0.0);
    let sentence = lines[1]["sentence"].as_str().unwrap();
    assert!(sentence.starts_with("rank 1 ended (SIGKILL)"), "{sentence}");

    let xml = fs::read_to_string(&junit).unwrap();
    let head =
        "<testsuite name=\"crash.py\" tests=\"3\" disabled=\"1\" errors=\"0\" failures=\"1\"";
    assert!(xml.contains(head), "{xml}");
    for case in &cases {
        let test = format!("<testcase name=\"{case}\" classname=\"crash.py\"");
        assert_eq!(xml.matches(&test).count(), 1, "{xml}");
    }
    let failure = "<failure message=\"crash: rank 1 ended (SIGKILL) in forward\" type=\"crash\">";
    assert!(xml.contains(failure), "{xml}");
    let skipped = "<skipped message=\"not claimed: `sliding-window` is not claimed\"";
    assert!(xml.contains(skipped), "{xml}");
    assert!(xml.contains("died of SIGKILL"), "{xml}");
}

#[rstest]
#[case::right(json!({}), true)]
#[case::fault_of_nobody(json!({"fault": null}), false)]
#[case::no_sentence(json!({"sentence": ""}), false)]
#[case::sure(json!({"confidence": 1.5}), false)]
#[case::verdict(json!({"verdict": "good"}), false)]
#[case::harness(json!({"verdict": "unclear"}), false)]
#[case::more(json!({"mood": "good"}), false)]
#[case::declared(json!({"declared": {"precision": "fused"}}), false)]
fn what_is_not_of_the_schema_is_seen(#[case] change: Value, #[case] is_valid: bool) {
    let mut line = json!({
        "implementation": "mine", "case": case(20, ""), "verdict": "fail",
        "fault": "implementation", "sentence": "dq is wrong", "mistake": "kv-heads-tiled",
        "confidence": 0.9, "seconds": 0.1, "worst_ratio": 7.5,
        "declared": {"precision": "fused", "upstream": "share", "parameters": "sum"},
    });
    for (key, value) in change.as_object().unwrap() {
        line[key] = value.clone();
    }
    assert_eq!(violations(&line).is_empty(), is_valid, "{line}");
}

/// The tensors that stand in a file, over the whole sequence.
fn read(path: &Path, names: &[&str]) -> Vec<Vec<f64>> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let one = |name: &&str| {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
        let array = Array {
            dtype: Dtype::F64,
            shape: tensor.shape().to_vec(),
            bytes: tensor.data().to_vec(),
        };
        array.to_f64()
    };
    names.iter().map(one).collect()
}

#[test]
fn a_kept_failure_has_all_that_there_is_and_can_be_asked_again() {
    let folder = TempDir::new().unwrap();
    let name = case(20, "");
    let name = name.replace("hkv4", "hkv2");
    let path = folder.path().join("kept");
    let keep = ["--keep", path.to_str().unwrap()];
    let run = judged("kv_tiled.py", &[case(20, ""), name.clone()], &keep);
    assert_eq!(run.code, 1);
    let kept = path.join("kv_tiled.py").join(&name);
    let note = format!("\n  kept: {}\n", kept.display());
    assert!(run.stdout.contains(&note), "{}", run.stdout);
    // What is right is not kept.
    let is_kept = fs::read_dir(kept.parent().unwrap()).unwrap().count();
    assert_eq!(is_kept, 1);

    let judgement = fs::read_to_string(kept.join("judgement.txt")).unwrap();
    assert!(run.stdout.contains(&judgement), "{judgement}");
    let (session, _) = Session::open(&kept).unwrap();
    let case: AttentionCase = name.parse().unwrap();
    let inputs = Inputs::of(&case);
    let dout = fixtures::sharding::cut(&inputs.dout, &case.shards());
    let wrong: Vec<_> = (0..2)
        .map(|rank| session.result(0, rank).unwrap().1)
        .collect();
    for (rank, dout) in dout.iter().enumerate() {
        let (info, tensors) = session.case(0, rank).unwrap();
        assert_eq!(info.name, name);
        assert_eq!(&tensors["dout"], dout);
    }
    let right = attention(&case, &inputs).unwrap();
    let file = kept.join("right/0.safetensors");
    let [out, may_be_off] =
        <[Vec<f64>; 2]>::try_from(read(&file, &["out", "out.may_be_off"])).unwrap();
    assert_eq!(out, right.out);
    assert!(
        may_be_off.iter().all(|&x| x > 0.0 && x < 1e-4),
        "{may_be_off:?}"
    );

    // A rank's program can be started on the folder, and answers it anew.
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters");
    let status = Command::new(python())
        .arg(adapters.join("torch_plain.py"))
        .env("ULYSSES_EXCHANGE", &kept)
        .status();
    assert!(status.unwrap().success());
    let answered: Vec<_> = (0..2)
        .map(|rank| session.result(0, rank).unwrap().1["out"].clone())
        .collect();
    assert_ne!(answered[0], wrong[0]["out"]);
    let whole = fixtures::sharding::join(&answered, &case.shards()).to_f64();
    for ((is, right), may_be_off) in whole.iter().zip(&out).zip(&may_be_off) {
        assert!(
            (is - right).abs() <= *may_be_off,
            "{is} {right} {may_be_off}"
        );
    }
}

#[test]
fn of_a_crash_every_word_is_kept() {
    let folder = TempDir::new().unwrap();
    let keep = ["--keep", folder.path().to_str().unwrap()];
    let run = judged("crash.py", &[case(22, ""), case(22, "")], &keep);
    assert_eq!(run.named("crash").len(), 2, "{}", run.stderr);
    for name in [case(22, ""), case(22, "") + ".2"] {
        let kept = folder.path().join("crash.py").join(name);
        let launcher = fs::read_to_string(kept.join("logs/launcher.stderr")).unwrap();
        assert!(launcher.contains("died of SIGKILL"), "{launcher}");
    }
    // Nothing that is there is written over.
    let again = judged("crash.py", &[case(22, "")], &keep);
    assert_eq!(again.code, 5);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
}

#[test]
fn what_a_program_says_that_never_starts_is_kept() {
    let folder = TempDir::new().unwrap();
    let run: Run = program()
        .args([
            "run",
            "--launch",
            "sh -c 'seq 1 100 >&2; exit 7'",
            "--case",
            &case(20, ""),
        ])
        .arg("--keep")
        .arg(folder.path())
        .output()
        .unwrap()
        .into();
    assert_eq!(run.named("crash"), [case(20, "")]);
    let (_, kept) = run.stdout.split_once("kept: ").unwrap();
    let kept = Path::new(kept.lines().next().unwrap());
    let log = fs::read_to_string(kept.join("logs/launcher.stderr")).unwrap();
    assert_eq!(log.lines().count(), 100);
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_before_anything_is_asked() {
    for flag in ["--json", "--junit", "--keep"] {
        let file = "/proc/nowhere/file";
        let run = program::run(&format!("run --world 1 --filter d16 {flag} {file}"));
        assert_eq!(run.code, 5, "{}", run.stderr);
        assert!(run.stderr.contains(file), "{}", run.stderr);
        assert!(!run.stderr.contains("[1/"), "{}", run.stderr);
    }
}

/// The order is that in which a person wants to know.
#[test]
fn a_diagnosis_comes_first_and_says_where_to_look() {
    let mut spoiled = Spoiled::new(|_| Some(How::Output));
    let name = case(20, "");
    let mut record = summary(&mut spoiled, &[&name], &mut KnownFailures::default())
        .records
        .remove(0);
    record.judgement = Judgement {
        diagnosis: Some(Box::new(Diagnosis {
            mistake: Some(Mistake::KvHeadsTiled),
            others: Vec::new(),
            confidence: 0.934,
            sentence: "KV heads are tiled on rank 1.".to_owned(),
            strip: Vec::new(),
        })),
        details: vec!["out: worst at head 1".to_owned()],
        ..Judgement::new(Verdict::Fail, "out is wrong")
    };
    let text = failure(
        "mine",
        &record,
        "ulysses-conformance run --implementation mine",
    );
    assert_eq!(
        text,
        format!(
            "mine {name}\n  \
             asked: E7 A1 A2 A3 A4 G1 G2 P1 R4\n  \
             fail (the implementation's fault): KV heads are tiled on rank 1.\n  \
             kv-heads-tiled, 93 % sure; look at repeat in place of repeat_interleave where KV \
             heads are expanded or replicated\n  \
             | out is wrong\n  \
             | out: worst at head 1\n  \
             again: ulysses-conformance run --implementation mine --case {name}\n"
        )
    );
}
