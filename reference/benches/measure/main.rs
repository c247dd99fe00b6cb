//! Measures the reference: by criterion, or for `compare.py`.
//!
//! With `--serve` it answers lines `attention ulysses 256 10` (group, workload,
//! size, iterations) with the seconds they took together, as JSON. That is how
//! `compare.py` measures this and its rivals in turns. Without it, criterion
//! measures every workload of the two groups.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod ranks;
mod workloads;

use criterion::{BenchmarkId, Criterion, Throughput};
use std::{
    env,
    io::{self, BufRead, Write},
    time::Duration,
};
use workloads::{ATTENTIONS, EXCHANGES, Workload};

fn main() {
    if env::args().any(|argument| argument == "--serve") {
        return serve();
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .configure_from_args();
    let mut group = criterion.benchmark_group("exchange");
    for size in [16, 20, 24, 26].map(|power| 1 << power) {
        group.throughput(Throughput::Bytes(size as u64));
        for (name, workload) in EXCHANGES {
            let id = BenchmarkId::new(name, size);
            group.bench_function(id, |b| {
                b.iter_custom(|iterations| workload(size, iterations))
            });
        }
    }
    group.finish();
    let mut group = criterion.benchmark_group("attention");
    for size in [256, 1024, 4096] {
        group.throughput(Throughput::Elements(size as u64));
        for (name, workload) in ATTENTIONS {
            let id = BenchmarkId::new(name, size);
            group.bench_function(id, |b| {
                b.iter_custom(|iterations| workload(size, iterations))
            });
        }
    }
    group.finish();
    criterion.final_summary();
}

fn serve() {
    let mut output = io::stdout();
    for line in io::stdin().lock().lines() {
        let seconds = answer(&line.unwrap()).as_secs_f64();
        writeln!(output, "{seconds}").unwrap();
        output.flush().unwrap();
    }
}

fn answer(line: &str) -> Duration {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [group, name, size, iterations] = words[..] else {
        panic!("\"{line}\" is not: group workload size iterations");
    };
    let find = |workloads: &[(&str, Workload)]| {
        workloads
            .iter()
            .find(|workload| workload.0 == name)
            .map(|workload| workload.1)
    };
    let workload = match group {
        "exchange" => find(&EXCHANGES),
        "attention" => find(&ATTENTIONS),
        _ => None,
    };
    let workload = workload.unwrap_or_else(|| panic!("no workload {group} {name}"));
    workload(size.parse().unwrap(), iterations.parse().unwrap())
}
