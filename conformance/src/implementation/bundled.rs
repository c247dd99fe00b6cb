//! The implementations that come with the harness, by name.

use std::env;
use std::path::PathBuf;

use super::{
    Conditions, External, Implementation, Interrupt, Launch, LaunchError, ReferenceOnThreads,
};
use clap::ValueEnum;

/// An implementation that comes with the harness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bundled {
    /// The bundled reference, its ranks as threads of this process
    Reference,
    /// The bundled reference under mpirun, behind the exchange
    ReferenceMpi,
    /// A Ulysses of some sixty lines in plain PyTorch over gloo, the example
    /// for implementers
    TorchPlain,
    /// A decoder of the Llama family around it
    TorchPlainLlama,
    /// deepspeed.sequence.layer.DistributedAttention of the real package,
    /// around SDPA
    DeepspeedDistributedAttention,
    /// UlyssesSPAttentionHF of the real package deepspeed, around the SDPA of
    /// transformers
    DeepspeedUlyssesHf,
    /// TiledMLP, TiledFusedLogitsLoss and UlyssesSPDataLoaderAdapter of the real
    /// package deepspeed
    DeepspeedTiled,
    /// sequence_tiled_compute of the real package deepspeed
    DeepspeedTiledCompute,
    /// LlamaForCausalLM of transformers, registered with the real package
    /// deepspeed
    DeepspeedLlama,
}

/// Where the adapters of this checkout are.
const ADAPTERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/adapters");
/// What their folder is called beside programs that were taken elsewhere.
const ADAPTERS_BESIDE: &str = "adapters";
/// The interpreter that `make setup` links.
const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.venv/bin/python");

impl Bundled {
    /// The name, as on the command line.
    pub fn name(self) -> String {
        // Every variant has a name, since none is skipped.
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// Makes it ready to be asked.
    ///
    /// # Errors
    ///
    /// If a program that it needs is not on this machine: which, and how to get
    /// it.
    pub fn implementation(
        self,
        conditions: Conditions,
        interrupt: &Interrupt,
    ) -> Result<Box<dyn Implementation>, String> {
        let launch = match self {
            Bundled::Reference => {
                let reference = ReferenceOnThreads::new(conditions.kernel, conditions.device)?;
                return Ok(Box::new(reference));
            }
            Bundled::ReferenceMpi => mpi_launch()?,
            Bundled::TorchPlain => python_launch("torch_plain.py")?,
            Bundled::TorchPlainLlama => python_launch("torch_plain_llama.py")?,
            Bundled::DeepspeedDistributedAttention => {
                python_launch("deepspeed_distributed_attention.py")?
            }
            Bundled::DeepspeedUlyssesHf => python_launch("deepspeed_ulysses_hf.py")?,
            Bundled::DeepspeedTiled => python_launch("deepspeed_tiled.py")?,
            Bundled::DeepspeedTiledCompute => python_launch("deepspeed_tiled_compute.py")?,
            Bundled::DeepspeedLlama => python_launch("deepspeed_llama.py")?,
        };
        Ok(Box::new(External::new(
            self.name(),
            launch.for_device(conditions.device),
            conditions,
            interrupt,
        )))
    }
}

/// The command of a user's own, ready to start adapters: the Python kit is on
/// the path, and each rank has one thread.
pub fn launch_of(command: &str) -> Result<Launch, LaunchError> {
    Ok(for_adapters(Launch::parse(command)?))
}

fn python_launch(adapter: &str) -> Result<Launch, String> {
    let python = env::var("ULYSSES_PYTHON").unwrap_or_else(|_| PYTHON.to_owned());
    let adapter = adapters().join(adapter);
    let words = vec![python, adapter.to_string_lossy().into_owned()];
    Launch::new(words)
        .map(for_adapters)
        .map_err(|error| format!("{error}: run `make setup`, or set ULYSSES_PYTHON"))
}

fn mpi_launch() -> Result<Launch, String> {
    let adapter = env::current_exe()
        .map_err(|error| error.to_string())?
        .with_file_name("reference-adapter");
    if !adapter.exists() {
        return Err(format!(
            "there is no program `{}`: run `cargo build`",
            adapter.display()
        ));
    }
    // More ranks than cores is what a test has, and a rank bound to a core
    // would then share it. What Open MPI keeps in files goes where it is removed
    // with the session, for ranks that are killed leave it behind.
    let adapter = adapter.to_string_lossy();
    let words = "mpirun --oversubscribe --bind-to none \
                 --mca btl_vader_backing_directory {exchange} \
                 --mca btl_sm_backing_directory {exchange} \
                 --mca orte_tmpdir_base {exchange} -n {world}"
        .split(' ')
        .chain([&*adapter]);
    let launch = Launch::new(words.map(str::to_owned).collect())
        .map_err(|error| format!("{error}: run `make setup`, or put an MPI on the PATH"))?;
    Ok(one_thread(launch)
        .with_variable("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .with_variable("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"))
}

fn for_adapters(launch: Launch) -> Launch {
    let path = env::var_os("PYTHONPATH").unwrap_or_default();
    let path = [adapters()]
        .into_iter()
        .chain(env::split_paths(&path).filter(|path| !path.as_os_str().is_empty()));
    // Only a folder with a colon in its name cannot be joined.
    let path = env::join_paths(path).unwrap_or_else(|_| adapters().into());
    one_thread(launch).with_variable("PYTHONPATH", path)
}

/// The folder of the adapters: beside this program where there is one, which is
/// how it is taken to a machine without a checkout.
fn adapters() -> PathBuf {
    env::current_exe()
        .map(|program| program.with_file_name(ADAPTERS_BESIDE))
        .ok()
        .filter(|folder| folder.is_dir())
        .unwrap_or_else(|| PathBuf::from(ADAPTERS))
}

/// Ranks share the cores: more threads than one each only fight for them.
fn one_thread(launch: Launch) -> Launch {
    launch.with_variable("OMP_NUM_THREADS", "1")
}
