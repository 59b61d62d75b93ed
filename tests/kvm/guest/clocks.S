# A guest that sleeps, wakes by its timers and writes down what each of its clocks shows. 64 KiB for `-bios`.
#
# 16-bit code with flat 32-bit data. Where it runs emulated, an instruction takes microseconds: a handler only counts,
# and the main loop looks at the clocks once a wake-up. The record of processor N lies at REPORT + N * 0x100:
#
#   0x00  wake-ups: odd while the record is being written
#   0x04  interrupts of the PIT, one each 20 ms (processor 0)
#   0x08  interrupts of the local APIC's timer, one each 10 ms
#   0x0c  how often the TSC was less than at any look before, of any processor
#   0x10  the same of kvmclock
#   0x18  TSC, at the last look
#   0x20  kvmclock, ns, at the last look; 0 without a kvmclock
#   0x28  CMOS time of day, BCD: second, minute, hour; read once a second (processor 0)
#   0x2c  what CPUID tells (processor 0): 1 the TSC is invariant, 2 there is a kvmclock
#   0x30  the TSC's frequency in kHz that CPUID tells, in leaf 0x40000010; 0: none (processor 0)
#
# Symbols: CPUS (1 or 2), PERIOD (TSC's ticks in 10 ms; 0: the timer is periodic; else in TSC-deadline mode), and
# PVCLOCK (1: ask for a kvmclock).

  .set REPORT, 0x2000
  .set PAGES, 0x3000             # kvmclock's page of processor N: PAGES + N * 0x40
  .set LOCK, 0x4000              # 1: some processor looks
  .set LATEST_TSC, 0x4010        # the highest of all looks, of all processors
  .set LATEST_NS, 0x4018
  .set DEADLINE, 0x4020          # of processor N: DEADLINE + N * 8
  .set LAST_TIME, 0x4030         # of the PIT's interrupts, when the time of day was read
  .set APIC, 0xfee00000
  .set PIT_COUNT, 23864          # of 1,193,182 Hz: 50 Hz

  .code16
  .text
  .globl _start

# Data segments reach all 4 GiB, from 0 on. Spoils eax, ebx.
  .macro flat_data
  lgdtl %cs:gdtr
  movl %cr0, %eax
  orb $1, %al
  movl %eax, %cr0
  jmp 1f
1: movw $8, %bx
  movw %bx, %ds
  andb $0xfe, %al
  movl %eax, %cr0
  jmp 1f
1: xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  .endm

  .macro vector number handler
  movw $\handler, (\number * 4)
  movw $0xf000, (\number * 4 + 2)
  .endm

  .macro apic register value
  movl $\value, %eax
  addr32 movl %eax, %ds:(APIC + \register)
  .endm

# The local APIC's timer of this processor, on this vector.
  .macro start_timer cpu number
  apic 0xf0, 0x13f
  .if PERIOD
  apic 0x320, (0x40000 + \number)
  rdtsc
  addl $PERIOD, %eax
  adcl $0, %edx
  movl %eax, (DEADLINE + 8 * \cpu)
  movl %edx, (DEADLINE + 8 * \cpu + 4)
  movl $0x6e0, %ecx
  wrmsr
  .else
  apic 0x3e0, 0xb
  apic 0x320, (0x20000 + \number)
  apic 0x380, 10000000
  .endif
  .endm

  .macro start_kvmclock cpu
  .if PVCLOCK
  movl $0x4b564d01, %ecx
  movl $(PAGES + 0x40 * \cpu + 1), %eax
  xorl %edx, %edx
  wrmsr
  .endif
  .endm

  .macro timer_handler cpu
  pushal
  incl (REPORT + 0x100 * \cpu + 8)
  .if PERIOD
  movl (DEADLINE + 8 * \cpu), %eax
  movl (DEADLINE + 8 * \cpu + 4), %edx
  addl $PERIOD, %eax
  adcl $0, %edx
  movl %eax, (DEADLINE + 8 * \cpu)
  movl %edx, (DEADLINE + 8 * \cpu + 4)
  movl $0x6e0, %ecx
  wrmsr
  .endif
  apic 0xb0, 0
  popal
  iretw
  .endm

_start:
  cli
  cld
  flat_data
  movw $0x7c00, %sp
  vector 0x20, on_pit
  vector 0x30, on_timer
  vector 0x31, on_timer_1
  vector 0x3f, on_nothing
  call what_is_told
  # The PICs: vectors from 0x20 on, only line 0 open.
  movb $0x11, %al
  outb %al, $0x20
  movb $0x20, %al
  outb %al, $0x21
  movb $0x04, %al
  outb %al, $0x21
  movb $0x01, %al
  outb %al, $0x21
  movb $0xfe, %al
  outb %al, $0x21
  movb $0xff, %al
  outb %al, $0xa1
  # The PIT's counter 0, mode 2.
  movb $0x34, %al
  outb %al, $0x43
  movw $PIT_COUNT, %ax
  outb %al, $0x40
  movb %ah, %al
  outb %al, $0x40
  start_timer 0, 0x30
  # The PIC's interrupts come through LINT0, which an APIC takes no word about before it is enabled.
  apic 0x350, 0x700
  start_kvmclock 0
  .if CPUS > 1
  # The second processor starts at 0x8000, in a far jump.
  movb $0xea, 0x8000
  movw $second, 0x8001
  movw $0xf000, 0x8003
  apic 0x310, 0x01000000
  apic 0x300, 0x4500
  movl $2000, %ecx
1: decl %ecx
  jnz 1b
  apic 0x310, 0x01000000
  apic 0x300, 0x4608
  .endif
  movl $REPORT, %ebp
  movl $PAGES, %edi
sleep:
  sti
  hlt
  cli
  incl %ds:(%ebp)
  call look
  cmpl $REPORT, %ebp
  jne 1f
  call time_of_day
1: incl %ds:(%ebp)
  jmp sleep

second:
  cli
  cld
  flat_data
  movw $0x7800, %sp
  start_timer 1, 0x31
  start_kvmclock 1
  movl $(REPORT + 0x100), %ebp
  movl $(PAGES + 0x40), %edi
  jmp sleep

on_pit:
  pushw %ax
  incl (REPORT + 4)
  movb $0x20, %al
  outb %al, $0x20
  popw %ax
  iretw
on_timer:
  timer_handler 0
on_timer_1:
  timer_handler 1
on_nothing:
  iretw

what_is_told:
  xorl %esi, %esi
  movl $0x80000007, %eax
  cpuid
  btl $8, %edx
  jnc 1f
  orl $1, %esi
1: movl $0x40000001, %eax
  cpuid
  btl $3, %eax
  jnc 2f
  orl $2, %esi
2: movl %esi, (REPORT + 0x2c)
  movl $0x40000000, %eax
  cpuid
  cmpl $0x40000010, %eax
  jb 3f
  movl $0x40000010, %eax
  cpuid
  movl %eax, (REPORT + 0x30)
3: ret

# Compares this processor's clocks with the latest that any processor saw. One at a time: between two looks of
# different processors lies the lock. ebp: the record; edi: kvmclock's page.
look:
  movb $1, %al
1: xchgb %al, LOCK
  testb %al, %al
  jnz 1b
again:
  movl %ds:(%edi), %esi
  rdtsc
  movl %eax, %ds:0x18(%ebp)
  movl %edx, %ds:0x1c(%ebp)
  testl %esi, %esi
  jz tsc_only
  testl $1, %esi
  jnz again
  # ns = system_time + ((TSC - tsc_timestamp) shifted * multiplier >> 32)
  subl %ds:8(%edi), %eax
  sbbl %ds:12(%edi), %edx
  movb %ds:28(%edi), %cl
  testb %cl, %cl
  jz 4f
  js 3f
2: shll $1, %eax
  rcll $1, %edx
  decb %cl
  jnz 2b
  jmp 4f
3: shrl $1, %edx
  rcrl $1, %eax
  incb %cl
  jnz 3b
4: movl %edx, %ecx
  mull %ds:24(%edi)
  movl %edx, %ebx
  movl %ecx, %eax
  mull %ds:24(%edi)
  addl %ebx, %eax
  adcl $0, %edx
  addl %ds:16(%edi), %eax
  adcl %ds:20(%edi), %edx
  cmpl %ds:(%edi), %esi
  jne again
  movl %eax, %ds:0x20(%ebp)
  movl %edx, %ds:0x24(%ebp)
  movl %eax, %ebx
  movl %edx, %ecx
  subl LATEST_NS, %ebx
  sbbl LATEST_NS + 4, %ecx
  jnc 5f
  incl %ds:0x10(%ebp)
  jmp tsc_only
5: movl %eax, LATEST_NS
  movl %edx, LATEST_NS + 4
tsc_only:
  movl %ds:0x18(%ebp), %eax
  movl %ds:0x1c(%ebp), %edx
  movl %eax, %ebx
  movl %edx, %ecx
  subl LATEST_TSC, %ebx
  sbbl LATEST_TSC + 4, %ecx
  jnc 6f
  incl %ds:0x0c(%ebp)
  jmp 7f
6: movl %eax, LATEST_TSC
  movl %edx, LATEST_TSC + 4
7: movb $0, LOCK
  ret

# Once a second or so: three ways to the host, unless the chip is just changing its registers.
time_of_day:
  movl (REPORT + 4), %eax
  subl LAST_TIME, %eax
  cmpl $50, %eax
  jb 1f
  movb $0x0a, %al
  outb %al, $0x70
  inb $0x71, %al
  testb $0x80, %al
  jnz 1f
  movl (REPORT + 4), %eax
  movl %eax, LAST_TIME
  .irp place, 0, 2, 4
  movb $\place, %al
  outb %al, $0x70
  inb $0x71, %al
  movb %al, (REPORT + 0x28 + \place / 2)
  .endr
1: ret

  .balign 8
gdt: .quad 0
  .quad 0x00cf93000000ffff
gdtr: .word 15
  .long 0xf0000 + gdt
  .org 0xfff0
  ljmp $0xf000, $_start
  .org 0xffff
  .byte 0
