// Blocks signals from the first moment of this program: before the constructors of LibTorch's libraries, which take
// most of the time from the start of the process to main. Until they are handled, they would end the process by
// default, and the first process of a container would never receive them. They are blocked here, and main unblocks them
// once it has handlers.
#include <csignal>
#include <cstring>
#include <initializer_list>

namespace {

sigset_t asked() noexcept {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2}) {
    sigaddset(&signals, signal);
  }
  return signals;
}

// The commands that handle them (src/cli/mod.rs); a test program that contains this file has none of these names.
bool handles(int count, char** arguments) noexcept {
  if (count < 2) {
    return false;
  }
  const char* slash = std::strrchr(arguments[0], '/');
  if (std::strcmp(slash == nullptr ? arguments[0] : slash + 1, "trainer") != 0) {
    return false;
  }
  for (const char* command : {"run", "resume", "boot", "work"}) {
    if (std::strcmp(arguments[1], command) == 0) {
      return true;
    }
  }
  return false;
}

void hold(int count, char** arguments, char**) noexcept {
  if (handles(count, arguments)) {
    const sigset_t signals = asked();
    sigprocmask(SIG_BLOCK, &signals, nullptr);
  }
}

// Called before any library's constructors (System V ABI, "Initialization and Termination Functions").
[[gnu::section(".preinit_array"), gnu::used]] void (*const hold_before_all)(int, char**, char**) = hold;

} // namespace

// Terminal stops (termios(3), tostop; a read by a background process) are ignored from here on, and in children: a
// stopped process receives no other signal, so that a notice would find nobody who saves. With SIGTTOU ignored a write
// succeeds, and with SIGTTIN ignored a read fails. A handler would not do: the kernel repeats the call after it.
extern "C" void trn_release_signals() noexcept {
  std::signal(SIGTTOU, SIG_IGN);
  std::signal(SIGTTIN, SIG_IGN);
  const sigset_t signals = asked();
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}
