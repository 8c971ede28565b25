//! A folder, a broker in it and guest models: processes of the program itself, as the user that a
//! test wants.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown, geteuid};
use serde_json::Value;
use tempfile::TempDir;

pub const PATIENCE: Duration = Duration::from_secs(60);
/// The user and the group that may do nothing.
pub const NOBODY: u32 = 65_534;

/// Who runs the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Who runs the test.
    Tester,
    /// Nobody; the tester, where that is not root.
    Nobody,
    /// A user of this number in nobody's group; likewise.
    Number(u32),
}

impl Who {
    fn number(self) -> Option<u32> {
        match self {
            _ if !geteuid().is_root() => None,
            Self::Tester => None,
            Self::Nobody => Some(NOBODY),
            Self::Number(number) => Some(number),
        }
    }

    fn user_of(self, command: &mut Command) {
        if let Some(number) = self.number() {
            command.uid(number).gid(NOBODY);
        }
    }
}

pub struct Place {
    folder: TempDir,
    program: PathBuf,
    who: Who,
}

impl Place {
    /// A folder of this user's, with the program in it: where it was built its user may not look.
    pub fn of(who: Who) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let built = env!("CARGO_BIN_EXE_vhost-pci-switch");
        let program = folder.path().join("vhost-pci-switch");
        if fs::hard_link(built, &program).is_err() {
            fs::copy(built, &program).unwrap();
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        if let Some(number) = who.number() {
            let owner = (Some(Uid::from_raw(number)), Some(Gid::from_raw(NOBODY)));
            chown(folder.path(), owner.0, owner.1).unwrap();
        }
        Self { folder, program, who }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, run by the folder's user.
    pub fn program(&self) -> Command {
        self.program_of(self.who)
    }

    /// The program, run by that user.
    pub fn program_of(&self, who: Who) -> Command {
        let mut command = Command::new(&self.program);
        command.env_remove("RUST_LOG").env_remove("RUST_BACKTRACE").env("NO_COLOR", "1").stdin(Stdio::null());
        who.user_of(&mut command);
        command
    }

    /// A configuration with these links: name and further keys.
    pub fn config(&self, top: &str, links: &[(&str, &str)]) -> PathBuf {
        let at = |name: &str| self.at(name).display().to_string();
        let mut text = format!("control_socket = \"{}\"\n{top}\n", at("control"));
        for (link, keys) in links {
            let (owner, peer) = (at(&format!("{link}-owner")), at(&format!("{link}-peer")));
            text += &format!(
                "[[link]]\nname = \"{link}\"\nowner_socket = \"{owner}\"\npeer_socket = \"{peer}\"\nwindow = \"128M\"\n{keys}\n"
            );
        }
        let path = self.at("switch.toml");
        fs::write(&path, text).unwrap();
        path
    }

    /// The command of a broker with one link.
    pub fn broker(&self, top: &str, keys: &str) -> Command {
        let config = self.config(top, &[("link", keys)]);
        let mut command = self.program();
        command.arg("run").arg("--config").arg(config).stderr(Stdio::piped()).stdout(Stdio::null());
        command
    }

    pub fn start(&self, top: &str, keys: &str) -> Running {
        Running::listens(self.broker(top, keys))
    }

    pub fn status(&self, json: bool) -> Output {
        let mut command = self.program();
        command.arg("status").arg("--control-socket").arg(self.at("control"));
        if json {
            command.arg("--json");
        }
        command.output().unwrap()
    }

    pub fn report(&self) -> Value {
        let output = self.status(true);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until the report is so.
    pub fn wait_until(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            if so(&report) {
                return report;
            }
            assert!(Instant::now() < end, "not {what}: {report:#}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the broker answers to this line; nothing, if it is no more.
    pub fn ask(&self, line: &str) -> String {
        let mut client = UnixStream::connect(self.at("control")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        drop(BufReader::new(&client).read_line(&mut answer));
        answer
    }

    /// A peer that sends and checks, until it is told to end.
    pub fn peer(&self, args: &[&str]) -> Guest {
        let all = [&["--check", "pattern", "--json-lines"], args].concat();
        Guest::start(self.guest(self.who, "gen", "link-peer"), &all)
    }

    /// An owner that sends and checks for so many seconds.
    pub fn owner(&self, seconds: &str, args: &[&str]) -> Guest {
        let all = [&["--mode", "both", "--json-lines", "--seconds", seconds], args].concat();
        Guest::start(self.guest(self.who, "owner", "link-owner"), &all)
    }

    /// A guest model of that user's, at that socket.
    pub fn guest(&self, who: Who, kind: &str, socket: &str) -> Command {
        let mut command = self.program_of(who);
        command.args(["guest", kind, "--socket"]).arg(self.at(socket));
        command
    }
}

/// A broker that listens. Killed if a test ends before it does.
pub struct Running {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Running {
    pub fn listens(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let running = Self { child, log: Arc::default() };
        let log = Arc::clone(&running.log);
        // Somebody has to read on, or the broker would wait for its log.
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *log.lock().unwrap() += &(line + "\n");
            }
        });
        running.logs("the broker listens");
        running
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until the log has these words; gives the line.
    pub fn logs(&self, words: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if let Some(line) = log.lines().find(|line| line.contains(words)) {
                return line.to_owned();
            }
            assert!(Instant::now() < end, "no '{words}' in\n{log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.pid()).unwrap()), signal).unwrap();
    }

    pub fn ends(&mut self) -> ExitStatus {
        ends(&mut self.child).unwrap_or_else(|| panic!("the broker does not end:\n{}", self.log()))
    }

    /// Ends it as its service manager would; it must leave nothing behind.
    pub fn terminate(mut self, place: &Place) {
        self.signal(Signal::SIGTERM);
        let status = self.ends();
        assert_eq!(status.code(), Some(0), "{status:?}\n{}", self.log());
        for name in ["control", "link-owner", "link-peer"] {
            assert!(!place.at(name).exists(), "{name} is left behind");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn ends(child: &mut Child) -> Option<ExitStatus> {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

/// A guest model, which prints JSON lines. Killed when dropped.
pub struct Guest {
    child: Child,
    lines: Arc<Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Guest {
    pub fn start(mut command: Command, args: &[&str]) -> Self {
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let lines: Arc<Mutex<String>> = Arc::default();
        let last = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                *last.lock().unwrap() = line;
            }
        });
        Self { child, lines, reader: Some(reader) }
    }

    /// Waits for its own end; gives its last line.
    pub fn ended(mut self) -> Value {
        let status = ends(&mut self.child).expect("the guest model does not end");
        assert!(status.success(), "{status:?}");
        self.reader.take().unwrap().join().unwrap();
        let line = self.lines.lock().unwrap().clone();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: '{line}'"))
    }

    /// Ends it by a signal; gives its last line.
    pub fn terminate(self) -> Value {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Signal::SIGTERM).unwrap();
        self.ended()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fields of `/proc/PID/task/*/status`, each thread's.
pub fn threads(pid: u32) -> Vec<Vec<(String, String)>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |path: &Path| fs::read_to_string(path.join("status")).ok();
    // A thread that has just ended has no file any more.
    tasks.filter_map(|task| Some(fields(&status(&task.ok()?.path())?))).collect()
}

fn fields(status: &str) -> Vec<(String, String)> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(':')?;
        Some((key.to_owned(), value.trim().to_owned()))
    };
    status.lines().filter_map(pair).collect()
}

pub fn field<'f>(fields: &'f [(String, String)], name: &str) -> &'f str {
    fields.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
}
