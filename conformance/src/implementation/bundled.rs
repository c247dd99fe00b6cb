//! The implementations that come with the harness, by name.

use std::env;
use std::path::PathBuf;

use clap::ValueEnum;
use fixtures::exchange::FOLDER_VARIABLE;

use super::{
    Conditions, External, Implementation, Interrupt, Launch, LaunchError, ReferenceOnThreads,
    nccl::nccl_serves,
};

/// An implementation that comes with the harness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bundled {
    /// The bundled reference, its ranks as threads of this process
    Reference,
    /// The bundled reference under mpirun, behind the exchange
    ReferenceMpi,
    /// The same, its ranks on GPUs of their own that exchange over NCCL
    ReferenceNccl,
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
            Bundled::ReferenceMpi => mpi_launch("mpi")?,
            Bundled::ReferenceNccl => {
                let device = conditions.device.device(0);
                nccl_serves(device.map_err(|reason| reason.to_string())?)?;
                mpi_launch("nccl")?
            }
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

fn mpi_launch(communicator: &str) -> Result<Launch, String> {
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
        .chain([&*adapter, "--communicator", communicator]);
    let launch = Launch::new(words.map(str::to_owned).collect())
        .map_err(|error| format!("{error}: run `make setup`, or put an MPI on the PATH"))?;
    let launch = one_thread(launch)
        .with_variable("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .with_variable("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .with_variable(CARRIED, carried(env::var(CARRIED).ok()));
    let unset = KEEPALIVE
        .into_iter()
        .filter(|(name, _)| env::var_os(name).is_none());
    Ok(unset.fold(launch, |launch, (name, value)| {
        launch.with_variable(name, value)
    }))
}

/// After ten seconds of silence mpirun says that a host was cut off, and the
/// daemon there ends its ranks. By itself Open MPI takes eight minutes.
const KEEPALIVE: [(&str, &str); 3] = [
    ("OMPI_MCA_oob_tcp_keepalive_time", "5"),
    ("OMPI_MCA_oob_tcp_keepalive_intvl", "1"),
    ("OMPI_MCA_oob_tcp_keepalive_probes", "5"),
];

/// The variables that Open MPI hands to ranks on other hosts, which have only
/// those. `-x` on the command line would forbid a user's own list.
const CARRIED: &str = "OMPI_MCA_mca_base_env_list";

fn carried(by_the_user: Option<String>) -> String {
    [FOLDER_VARIABLE.to_owned(), ONE_THREAD.to_owned()]
        .into_iter()
        .chain(by_the_user.filter(|list| !list.is_empty()))
        .collect::<Vec<_>>()
        .join(";")
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
    launch.with_variable(ONE_THREAD, "1")
}

const ONE_THREAD: &str = "OMP_NUM_THREADS";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ranks_on_other_hosts_are_given_leaves_room_for_a_users_list() {
        let own = "ULYSSES_EXCHANGE;OMP_NUM_THREADS";
        assert_eq!(carried(None), own);
        assert_eq!(carried(Some(String::new())), own);
        let both = format!("{own};NCCL_DEBUG;FOO=1");
        assert_eq!(carried(Some("NCCL_DEBUG;FOO=1".to_owned())), both);
    }
}
