//! Lists: streaming where a server has them, else by pages; and what follows from a whole one.

use std::collections::BTreeSet;
use std::time::Instant;

use ferrule_model::names::ObjectName;
use hyper::StatusCode;
use tokio::time::Instant as Clock;
use tracing::{debug, info};

use super::super::failure::{Cause, Failure};
use super::super::servers::Asked;
use super::super::stream::{Frames, whole};
use super::super::wire::{self, Frame};
use super::{
    Broken, LONGEST_LIST, MOST_PAGES, PAGE, PAGES, Reflector, STREAMING_SILENCE, STUCK, Streaming,
    escape, is_refusal, of_status, path, watch_time,
};

impl Reflector {
    pub(super) async fn list(&mut self) -> Result<(), Broken> {
        self.passed_over = false;
        let (known, failures) = match self.streaming {
            Streaming::No(until) if Clock::now() < until => return self.list_pages().await,
            Streaming::No(_) => (false, 0),
            Streaming::Unknown(failures) => (false, failures),
            Streaming::Yes(failures) => (true, failures),
        };
        let (failure, at_once) = match self.list_streaming().await {
            Ok((frames, asked)) => {
                // The same stream goes on as the watch.
                self.streaming = Streaming::Yes(0);
                return self.follow(frames, asked).await;
            }
            Err(Broken::NotStreamed(failure)) => {
                // What breaks off where it worked once may have had a bad day.
                let at_once = !known || matches!(failure.cause, Cause::Refused(_));
                (failure, at_once)
            }
            Err(Broken::Failed(failure)) => (failure, false),
            Err(other) => return Err(other),
        };
        debug!(kind = %self.kind, "no streaming list: {}", failure.words);
        self.streaming = match failures + 1 {
            _ if at_once => Streaming::No(Clock::now() + PAGES),
            STUCK.. => Streaming::No(Clock::now() + PAGES),
            failures if known => Streaming::Yes(failures),
            failures => Streaming::Unknown(failures),
        };
        if at_once {
            self.list_pages().await
        } else {
            Err(Broken::Failed(failure))
        }
    }

    /// Lists by watching. Returns the stream, of which the list was the beginning.
    async fn list_streaming(&mut self) -> Result<(Frames, Asked), Broken> {
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&sendInitialEvents=true\
             &resourceVersionMatch=NotOlderThan&timeoutSeconds={}",
            path(self.kind),
            watch_time(),
        );
        // A server that knows the parameters shows so by its list. One that does not
        // refuses them, or never says that the list is whole.
        let (body, asked) = match self.servers.get(&path).await {
            Err(failure) if is_refusal(failure.cause) => return Err(Broken::NotStreamed(failure)),
            Err(failure) => return Err(Broken::Failed(failure)),
            Ok(answer) => answer,
        };
        let mut frames = Frames::new(body);
        let mut fresh = BTreeSet::new();
        let began = Instant::now();
        loop {
            let line = if began.elapsed() > LONGEST_LIST {
                let words = format!("a list that is not whole after {LONGEST_LIST:?}");
                Err(Failure::nonsense(words))
            } else {
                frames.next(STREAMING_SILENCE).await
            };
            let frame = line.and_then(|line| {
                let Some(line) = line else {
                    let words = "the list ended before it was whole".to_owned();
                    return Err(Failure::new(Cause::Unreachable, words));
                };
                wire::frame(self.kind, &line).map_err(Failure::nonsense)
            });
            let failure = match frame {
                Ok(Frame::Applied(item)) => {
                    fresh.insert(item.key.name.clone());
                    self.applied(item).await?;
                    match self.bounded(fresh.len()) {
                        Ok(()) => continue,
                        Err(failure) => failure,
                    }
                }
                Ok(Frame::Deleted(item)) => {
                    fresh.remove(&item.key.name);
                    self.deleted(item.key.name).await?;
                    continue;
                }
                Ok(Frame::Bookmark {
                    resource_version,
                    initial_end: true,
                }) => {
                    self.finish_list(&fresh, Some(resource_version)).await?;
                    return Ok((frames, asked));
                }
                Ok(Frame::Bookmark { .. }) => continue,
                Ok(Frame::Error(status)) => of_status(&status),
                Err(failure) => failure,
            };
            let failure = self.servers.broke_off(&asked, failure);
            return Err(Broken::NotStreamed(failure));
        }
    }

    async fn list_pages(&mut self) -> Result<(), Broken> {
        let mut fresh = BTreeSet::new();
        let mut next: Option<String> = None;
        let mut pages = 0;
        loop {
            let limit = self.paging.then(|| format!("limit={PAGE}"));
            let token = next
                .as_ref()
                .map(|token| format!("continue={}", escape(token)));
            let query: Vec<String> = limit.into_iter().chain(token).collect();
            let path = format!("{}?{}", path(self.kind), query.join("&"));
            let (body, asked) = match self.servers.get(&path).await {
                Err(failure) => {
                    if failure.cause == Cause::Refused(StatusCode::GONE) {
                        // Pages that outlive their state. All at once, then.
                        self.paging = false;
                    }
                    return Err(failure.into());
                }
                Ok(answer) => answer,
            };
            let page = whole(body).await;
            let page =
                page.and_then(|body| wire::page(self.kind, &body).map_err(Failure::nonsense));
            let page = match page {
                Ok(page) => page,
                Err(failure) => return Err(self.broke_off(&asked, failure)),
            };
            for item in page.items {
                fresh.insert(item.key.name.clone());
                self.applied(item).await?;
            }
            if let Err(failure) = self.bounded(fresh.len()) {
                return Err(self.broke_off(&asked, failure));
            }
            pages += 1;
            match page.next {
                Some(token) if Some(&token) == next.as_ref() => {
                    let words = "a page of the list is its own next page".to_owned();
                    return Err(self.broke_off(&asked, Failure::nonsense(words)));
                }
                Some(_) if pages >= MOST_PAGES => {
                    let words = format!("a list of more than {MOST_PAGES} pages");
                    return Err(self.broke_off(&asked, Failure::nonsense(words)));
                }
                Some(token) => next = Some(token),
                None => {
                    self.paging = true;
                    return self.finish_list(&fresh, Some(page.resource_version)).await;
                }
            }
        }
    }

    /// What was known and is not in a whole list is gone.
    pub(super) async fn finish_list(
        &mut self,
        fresh: &BTreeSet<ObjectName>,
        version: Option<String>,
    ) -> Result<(), Broken> {
        let gone: Vec<ObjectName> = self.known.difference(fresh).cloned().collect();
        for name in gone {
            self.deleted(name).await?;
        }
        self.state.unreadable.retain(|name, _| fresh.contains(name));
        self.unnamed.retain(|name| fresh.contains(name));
        self.state.unnamed = self.unnamed.len();
        if self.passed_over {
            // What is gone has made room.
            let words = "lists that broke off had too many objects".to_owned();
            return Err(Broken::Failed(Failure::nonsense(words)));
        }
        self.version = version;
        if !self.state.listed {
            info!(kind = %self.kind, objects = fresh.len(), "listed");
        }
        self.state.listed = true;
        if !self.doubted {
            self.state.away = None;
        }
        self.flush().await
    }
}
