//! The agent's socket, against whoever can reach it.

mod garbage;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use ferrule_api::status::{SocketStatus, Status};
use ferrule_api::{Allocation, Answer, Call, Client, Wanted};
use rustix::process::Uid;
use rustix::thread::{set_thread_groups, set_thread_res_uid};

use super::world;
use crate::context::Context;
use crate::node::Node;
use crate::random::{self, Random};
use crate::wait;

/// Repeats an attack; the threads' order stays the machine's.
const SEED: &str = "FERRULE_SOCKET_SEED";

/// How long the attack goes on.
const SECONDS: &str = "FERRULE_SOCKET_SECONDS";

/// Attackers at work at the same time.
const ATTACKERS: u64 = 8;

/// Connections of one attacker that are left half open.
const HALF_OPEN: usize = 20;

/// Connections that one attacker makes at once.
const BURST: usize = 60;

/// Longest that a reply may take: the agent gives a slow client 10 s, and is itself attacked.
const PATIENCE: Duration = Duration::from_secs(30);

/// Memory that the agent may have taken for good, in KiB.
const MEMORY: u64 = 16 * 1024;

/// Garbage in every form, from many connections at once: each line is answered
/// as the protocol says, and afterwards the agent is as it was before.
pub(super) fn survives_garbage(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    let seconds = random::from_environment(SECONDS)?.unwrap_or(10);
    let mut out = std::io::stdout();
    writeln!(out, "     {SEED}={seed} {SECONDS}={seconds}")?;
    // Mutated names lease addresses that nobody gives back.
    let ranges = ["10.244.0.0/16", "fd00:10:244:1::/64"];
    let node = Node::with_pod_ranges(context, "node-a", &ranges)?;
    node.start()?;
    let tally = Tally::default();
    survive(&node, seed, Duration::from_secs(seconds), &tally)
        .with_context(|| format!("{SEED}={seed}"))?;
    writeln!(
        out,
        "     {} connections, {} calls answered, {} refused as garbage",
        tally.connections.load(Ordering::Relaxed),
        tally.answered.load(Ordering::Relaxed),
        tally.refused.load(Ordering::Relaxed)
    )?;
    Ok(())
}

/// What the attackers did.
#[derive(Debug, Default)]
struct Tally {
    connections: AtomicU64,
    answered: AtomicU64,
    refused: AtomicU64,
    /// One of them has seen what must not be.
    failed: AtomicBool,
}

fn survive(node: &Node, seed: u64, time: Duration, tally: &Tally) -> anyhow::Result<()> {
    let socket = node.socket();
    let said = status(&socket)?.socket;
    let before = node.usage()?;
    // The first second brings in the code that was never run before.
    attack(&socket, seed ^ 1, Duration::from_secs(1), tally)?;
    let warm = node.usage()?;
    attack(&socket, seed, time, tally)?;
    node.check_alive()?;
    serves(&socket)?;
    counts_garbage(&socket, said, tally)?;
    // Clients that went silent are let go after 10 s.
    wait::until_ok("descriptors as before", wait::SETTLED, || {
        let now = node.usage()?;
        ensure!(
            now.descriptors <= before.descriptors,
            "{} descriptors, {} before",
            now.descriptors,
            before.descriptors
        );
        Ok(())
    })?;
    let after = node.usage()?;
    writeln!(
        std::io::stdout(),
        "     memory: {} KiB at the start, {} after a second, {} at the end",
        before.resident,
        warm.resident,
        after.resident
    )?;
    ensure!(
        after.resident <= warm.resident + MEMORY,
        "memory grew from {} to {} KiB",
        warm.resident,
        after.resident
    );
    node.check_alive()
}

/// Lets all attackers loose for a time.
fn attack(socket: &Path, seed: u64, time: Duration, tally: &Tally) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    thread::scope(|scope| -> anyhow::Result<()> {
        let attackers: Vec<_> = (0..ATTACKERS)
            .map(|number| {
                let attacker = Attacker {
                    random: Random::new(seed.wrapping_add(number << 32)),
                    socket: socket.to_owned(),
                    tally,
                    half_open: Vec::new(),
                };
                scope.spawn(move || {
                    let outcome = attacker.attack_until(end);
                    if outcome.is_err() {
                        tally.failed.store(true, Ordering::Relaxed);
                    }
                    outcome
                })
            })
            .collect();
        for attacker in attackers {
            let outcome = attacker.join();
            outcome.map_err(|_| anyhow!("an attacker panicked"))??;
        }
        Ok(())
    })
}

/// Valid calls get what they ask for.
fn serves(socket: &Path) -> anyhow::Result<()> {
    let mut client = Client::connect(socket, PATIENCE)?;
    let attachment = garbage::attachment(1000)?;
    let allocate = Call::Allocate(Box::new(Wanted::new(attachment.clone())));
    match client.call(allocate.clone())? {
        Answer::Allocated(first) => {
            ensure!(first.addresses.len() == 2, "{first:?}");
            let again = client.call(allocate)?;
            let same = Allocation {
                renewed: true,
                ..first
            };
            ensure!(again == Answer::Allocated(same), "another lease: {again:?}");
        }
        other => bail!("allocate: {other:?}"),
    }
    let released = client.call(Call::Release { attachment })?;
    ensure!(released == Answer::Released, "release: {released:?}");
    status(socket)?;
    Ok(())
}

/// What was refused is counted, and what was called is not refused.
fn counts_garbage(socket: &Path, before: SocketStatus, tally: &Tally) -> anyhow::Result<()> {
    let refused = before.bad_requests + tally.refused.load(Ordering::Relaxed);
    let counted = status(socket)?.socket;
    // Those who did not wait for their answer may add to it.
    ensure!(
        counted.bad_requests >= refused,
        "{} bad requests counted, {refused} answered",
        counted.bad_requests
    );
    let answered = before.calls + tally.answered.load(Ordering::Relaxed);
    ensure!(
        counted.calls > answered,
        "{} calls counted, {answered} answered",
        counted.calls
    );
    let line = b"{\"version\":1,\"call\":\"fly\"}\n";
    let reply = exchange(socket, line, &mut Pace::AtOnce)?;
    let reply = String::from_utf8_lossy(&reply);
    ensure!(
        reply.contains("badRequest") && reply.contains("fly"),
        "the refusal names nothing: {reply}"
    );
    let now = status(socket)?.socket.bad_requests;
    ensure!(
        now > counted.bad_requests,
        "still {now} bad requests after another one"
    );
    Ok(())
}

/// How the node fares, once the agent can say.
fn status(socket: &Path) -> anyhow::Result<Box<Status>> {
    wait::until_ok("a status", wait::SETTLED, || {
        match Client::connect(socket, PATIENCE)?.call(Call::Status)? {
            Answer::Status(status) => Ok(status),
            other => bail!("{other:?}"),
        }
    })
}

struct Attacker<'a> {
    random: Random,
    socket: PathBuf,
    tally: &'a Tally,
    half_open: Vec<UnixStream>,
}

impl Attacker<'_> {
    fn attack_until(mut self, end: Instant) -> anyhow::Result<()> {
        while Instant::now() < end && !self.tally.failed.load(Ordering::Relaxed) {
            let kind = self.random.below(20);
            let attack = match kind {
                0..=3 => garbage::rubbish(&mut self.random),
                4..=13 => garbage::mutated(&mut self.random)?,
                14 => {
                    self.leave_half_open()?;
                    continue;
                }
                15 => {
                    self.burst()?;
                    continue;
                }
                16 => {
                    self.never_read()?;
                    continue;
                }
                17 => {
                    let line = garbage::mutated(&mut self.random)?;
                    let mut pace = Pace::Slow(self.random.clone());
                    // The rest of a long line would take too long this way.
                    let short = &line[..line.len().min(100)];
                    self.expect_answers(short, &mut pace)?;
                    continue;
                }
                _ => self.several()?,
            };
            self.expect_answers(&attack, &mut Pace::AtOnce)?;
        }
        Ok(())
    }

    /// Several requests in one write, some of them none.
    fn several(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for _ in 0..=self.random.below(30) {
            bytes.extend(garbage::valid(&mut self.random)?);
        }
        if self.random.chance(50) {
            bytes.extend(garbage::mutated(&mut self.random)?);
            bytes.extend(garbage::valid(&mut self.random)?);
        }
        Ok(bytes)
    }

    /// Sends bytes and then says that no more will come; each line is answered.
    fn expect_answers(&mut self, bytes: &[u8], pace: &mut Pace) -> anyhow::Result<()> {
        self.tally.connections.fetch_add(1, Ordering::Relaxed);
        let said = exchange(&self.socket, bytes, pace)?;
        self.check(bytes, &said)
    }

    fn check(&self, sent: &[u8], said: &[u8]) -> anyhow::Result<()> {
        self.compare(sent, said).with_context(|| {
            let start = String::from_utf8_lossy(&sent[..sent.len().min(300)]).into_owned();
            format!("{} bytes were sent: {start:?}", sent.len())
        })
    }

    /// Compares what came back with what the protocol says.
    fn compare(&self, sent: &[u8], said: &[u8]) -> anyhow::Result<()> {
        let expected = garbage::answers(sent);
        let lines: Vec<&[u8]> = said.split_inclusive(|byte| *byte == b'\n').collect();
        ensure!(
            lines.len() == expected.len(),
            "{} replies to {} lines",
            lines.len(),
            expected.len()
        );
        for (line, call) in lines.into_iter().zip(&expected) {
            garbage::check_reply(line, call.as_ref())?;
            let counter = match call {
                Some(_) => &self.tally.answered,
                None => &self.tally.refused,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A connection that says a part of something and then nothing, for as long
    /// as there is room for it.
    fn leave_half_open(&mut self) -> anyhow::Result<()> {
        let mut stream = connect(&self.socket)?;
        let line = garbage::valid(&mut self.random)?;
        let end = self.random.below(line.len());
        stream.write_all(&line[..end])?;
        if self.half_open.len() == HALF_OPEN {
            let oldest = self.random.below(HALF_OPEN);
            self.half_open.swap_remove(oldest);
        }
        self.half_open.push(stream);
        Ok(())
    }

    /// Many connections before the first says anything; all are served.
    fn burst(&mut self) -> anyhow::Result<()> {
        let mut streams = Vec::new();
        for _ in 0..BURST {
            streams.push(connect(&self.socket)?);
        }
        let mut sent = Vec::new();
        for stream in &mut streams {
            let line = if self.random.chance(50) {
                garbage::mutated(&mut self.random)?
            } else {
                garbage::valid(&mut self.random)?
            };
            send(stream, &line, &mut Pace::AtOnce)?;
            sent.push(line);
        }
        for (stream, line) in streams.iter_mut().zip(&sent) {
            self.tally.connections.fetch_add(1, Ordering::Relaxed);
            let said = receive(stream)?;
            self.check(line, &said)?;
        }
        Ok(())
    }

    /// Asks and asks and takes no answer, then is gone.
    fn never_read(&mut self) -> anyhow::Result<()> {
        let mut stream = connect(&self.socket)?;
        stream.set_write_timeout(Some(Duration::from_millis(50)))?;
        let line = garbage::valid(&mut self.random)?;
        for _ in 0..500 {
            if stream.write_all(&line).is_err() {
                // The agent waits for us, and so reads no further.
                break;
            }
        }
        if self.random.chance(20) {
            self.half_open.truncate(HALF_OPEN - 1);
            self.half_open.push(stream);
        }
        Ok(())
    }
}

/// How bytes are written.
enum Pace {
    AtOnce,
    /// In small pieces with pauses.
    Slow(Random),
}

fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let stream = UnixStream::connect(socket).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends bytes and the end, and returns all that comes back before the agent's end.
fn exchange(socket: &Path, bytes: &[u8], pace: &mut Pace) -> anyhow::Result<Vec<u8>> {
    let mut stream = connect(socket)?;
    send(&mut stream, bytes, pace)?;
    receive(&mut stream)
}

fn send(stream: &mut UnixStream, bytes: &[u8], pace: &mut Pace) -> anyhow::Result<()> {
    let written = match pace {
        Pace::AtOnce => stream.write_all(bytes),
        Pace::Slow(random) => bytes.chunks(7).try_for_each(|piece| {
            thread::sleep(Duration::from_millis(u64::from(random.chance(50)) * 10));
            stream.write_all(piece)
        }),
    };
    match written.and_then(|()| stream.shutdown(Shutdown::Write)) {
        // Whoever has refused a line reads no further.
        Err(error) if is_end(error.kind()) => Ok(()),
        other => other.context("send"),
    }
}

fn receive(stream: &mut UnixStream) -> anyhow::Result<Vec<u8>> {
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) if is_end(error.kind()) => {}
        Err(error) => return Err(error).context("no reply in time"),
    }
    Ok(said)
}

fn is_end(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected
    )
}

/// `nobody`.
const STRANGER: u32 = 65_534;

/// Users other than root cannot connect; where the file's mode lets them, the
/// agent looks at their credentials and says nothing.
pub(super) fn refuses_other_users(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let socket = node.socket();
    let before = status(&socket)?.socket;
    ensure!(before.refused_connections == 0, "{before:?}");
    match as_stranger(|| Ok(UnixStream::connect(&socket)))? {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        other => bail!("a stranger connects to a socket of mode 0600: {other:?}"),
    }
    // It never came as far as the agent.
    let refused = status(&socket)?.socket.refused_connections;
    ensure!(refused == 0, "{refused} connections refused");

    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))?;
    let line = ferrule_api::encode(&ferrule_api::Request::new(Call::Status))?;
    let said = as_stranger(|| exchange(&socket, &line, &mut Pace::AtOnce))?;
    ensure!(
        said.is_empty(),
        "a stranger is told {:?}",
        String::from_utf8_lossy(&said)
    );
    let now = status(&socket)?.socket;
    ensure!(now.refused_connections == 1, "{now:?}");
    ensure!(now.bad_requests == before.bad_requests, "{now:?}");
    // The same way, as root, there is an answer: it was the credentials.
    let said = exchange(&socket, &line, &mut Pace::AtOnce)?;
    garbage::check_reply(&said, Some(&Call::Status))?;
    node.check_alive()
}

/// Runs `work` on a thread that is another user's, and ends with it: credentials
/// belong to a thread, and `SO_PEERCRED` are those of the one that connects.
fn as_stranger<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let done = thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            let uid = Uid::from_raw(STRANGER);
            set_thread_groups(&[])?;
            set_thread_res_uid(uid, uid, uid)?;
            work()
        });
        stranger.join()
    });
    done.map_err(|_| anyhow!("the stranger panicked"))?
}
